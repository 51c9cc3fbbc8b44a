"""Scores of classes: how strange each class would be as the target. `rank` counts from 1, ties to the lowest index.

Where a score is randomised, u is uniform in (0, 1], one number a row from the key, and 1 without randomisation: then scores
tie, and sets are larger than they need be. A set may be empty unless `never_empty` wraps the score; one that is not holds
the most probable class, but under `averaged`.
"""

from functools import cache

import jax
import jax.numpy as jnp

from bayescal.conformal.conformity import Conformity, class_candidates, class_conformity
from bayescal.decompose import mutual_information
from bayescal.predictive import Categorical, weighted_sum


@cache
def lac() -> Conformity:
    """LAC (THR): s(x, y) = 1 - p(y | x), the smallest sets on average where p is right.

    In [0, 1]. Probabilities below 6e-8 tie at 1 in float32.

    Source: Sadinle, Lei and Wasserman 2019 (recalled).
    """
    return class_conformity(lambda pred, key: -jnp.expm1(pred.log_probs()), randomised=False, name="LAC: 1 - p")


@cache
def margin() -> Conformity:
    """Margin: s(x, y) = max of p over the other classes - p(y | x).

    In [-1, 1]; negative for the most probable class alone, and 0 for classes that tie with it.

    Raises:
        ValueError: when used on a single class.
    Source: Johansson, Linusson et al. 2017 (recalled).
    """

    def candidates(pred, key):
        probs = jnp.exp(pred.log_probs())
        if probs.shape[-1] < 2:
            raise ValueError(
                "`pred` must have at least two classes, got one. Of one class there is no margin: use `lac()`."
            )
        first, second = (x[..., None] for x in jnp.moveaxis(jax.lax.top_k(probs, 2)[0], -1, 0))
        top = jnp.arange(probs.shape[-1]) == probs.argmax(-1)[..., None]
        return jnp.where(top, second, first) - probs

    return class_conformity(candidates, randomised=False, name="margin: largest other p - p")


@cache
def top_k() -> Conformity:
    """Rank: s(x, y) = place of y among the classes by p, so that every set holds the same number of classes.

    Whole numbers in [1, classes]. Ranks tie between rows, hence conservative: coverage is that of the smallest such number
    that is enough.

    Source: Angelopoulos et al. 2021, section 4 (recalled).
    """
    return class_conformity(lambda pred, key: _ranks(pred.log_probs()), randomised=False, name="top k: rank")


@cache
def aps(*, randomised: bool = True) -> Conformity:
    """APS: s(x, y) = probability of the classes of lower rank than y + u p(y | x).

    In [0, 1]. Sets are larger where the prediction is less sure, for coverage that varies less from row to row than LAC's.
    Without randomisation the label counts in full: the last class scores 1 in every row, and sets may be many times as
    large.

    Args:
        randomised: whether u is drawn, which needs a key.

    Source: Romano, Sesia and Candès 2020, equations 5 and 6 (recalled).
    """
    return class_conformity(
        lambda pred, key: _adaptive(pred.log_probs(), _share(pred, key)),
        randomised=randomised,
        name=f"APS: cumulative p, {_words(randomised)}",
    )


@cache
def raps(*, penalty: float, start: int, randomised: bool = True) -> Conformity:
    """RAPS: APS + penalty * max(rank - start, 0), which keeps the classes of high rank out.

    In [0, 1 + penalty (classes - start)].

    Args:
        penalty: of each rank beyond `start`, at least 0; 0.01 is usual.
        start: the last rank without a penalty, from 0; 5 is usual for a thousand classes.
        randomised: as in `aps`.

    Raises:
        ValueError: for a negative penalty or start.
    Source: Angelopoulos, Bates, Malik and Jordan 2021, equation 4 (recalled).
    """
    _check_penalty(penalty)
    if start < 0:
        raise ValueError(f"`start` must be the last rank without a penalty, at least 0, got {start}. 5 is usual.")

    def candidates(pred, key):
        log_probs = pred.log_probs()
        return _adaptive(log_probs, _share(pred, key)) + penalty * jnp.maximum(_ranks(log_probs) - start, 0)

    name = f"RAPS: cumulative p + {penalty:g} a rank beyond {start}, {_words(randomised)}"
    return class_conformity(candidates, randomised=randomised, name=name)


@cache
def saps(*, penalty: float, randomised: bool = True) -> Conformity:
    """SAPS: s(x, y) = u max p for the most probable class, and max p + penalty * (rank - 2 + u) for the others.

    In [0, 1 + penalty (classes - 1)]. Of the probabilities only the largest counts: the others' are noisy, and their tail is
    long.

    Args:
        penalty: of each rank, at least 0; 0.1 to 0.5 is usual.
        randomised: as in `aps`.

    Raises:
        ValueError: for a negative penalty.
    Source: Huang, Xi, Zhang, Yao, Zeng and Wei 2024, equation 6 (recalled).
    """
    _check_penalty(penalty)

    def candidates(pred, key):
        log_probs = pred.log_probs()
        rank, share, most = _ranks(log_probs), _share(pred, key), jnp.exp(log_probs.max(-1, keepdims=True))
        return jnp.where(rank == 1, share * most, most + penalty * (rank - 2 + share))

    name = f"SAPS: max p + {penalty:g} a rank, {_words(randomised)}"
    return class_conformity(candidates, randomised=randomised, name=name)


@cache
def never_empty(score: Conformity) -> Conformity:
    """The score, but -infinity for the most probable class (ties to the lowest index), which is then in every set.

    The threshold knows of it, so that coverage stays as stated: at least 1 - alpha, and the accuracy where that is more.
    Where it is more, every set is the most probable class alone.

    Raises:
        TypeError: for a score of regression.
    """
    inner = class_candidates(score)

    def candidates(pred, key):
        scores, log_probs = inner(pred, key), pred.log_probs()
        top = jnp.arange(log_probs.shape[-1]) == log_probs.argmax(-1)[..., None]
        return jnp.where(top, -jnp.inf, scores)

    return class_conformity(candidates, randomised=score.randomised, name=f"{score.name}, top class always in")


@cache
def epistemic(score: Conformity, *, floor: float) -> Conformity:
    """s(x, y) / (floor + I[y; member]): the score in units of how much the members disagree, so that sets grow with it.

    As normalised residuals do for regression. With a floor far above the mutual information it is the plain score.

    Args:
        score: not negative, such as `lac()` and `aps()`.
        floor: nats, positive; about the median mutual information of the calibration rows.

    Raises:
        ValueError: for a floor that is not positive.
        TypeError: for a score of regression.
    Source: normalised scores of Papadopoulos, Gammerman and Vovk 2008 (recalled); the scale is ours.
    """
    inner = class_candidates(score)
    if not floor > 0:
        raise ValueError(
            f"`floor` must be a positive number of nats, got {floor}. Take the median of `mutual_information(pred)` over the "
            "calibration rows."
        )
    return class_conformity(
        lambda pred, key: inner(pred, key) / (floor + mutual_information(pred))[..., None],
        randomised=score.randomised,
        name=f"{score.name}, divided by {floor:g} + mutual information",
    )


@cache
def averaged(score: Conformity) -> Conformity:
    """Mean over members of each member's own score, sum_s w_s s(p_s(x), y), where other scores see the pool.

    All members share the row's u. What is in the set first is the class of the least mean score, which for adaptive scores
    need not be the pool's most probable. For LAC it is LAC.

    Raises:
        TypeError: for a score of regression.
    """
    inner = class_candidates(score)

    def candidates(pred, key):
        each = jax.vmap(lambda log_probs: inner(Categorical(log_probs[None], normalised=True), key))
        return weighted_sum(each(pred.member_log_probs()), pred.weights()[..., None])

    return class_conformity(candidates, randomised=score.randomised, name=f"{score.name}, mean over members")


def _share(pred, key):
    """How much of itself a class counts: u in (0, 1], (rows, 1), or 1 without a key."""
    if key is None:
        return jnp.float32(1)
    return 1 - jax.random.uniform(key, pred.batch_shape)[..., None]


def _order(log_probs):
    return jnp.argsort(-log_probs, axis=-1, stable=True)


def _ranks(log_probs):
    """Place of each class by probability, from 1."""
    return (jnp.argsort(_order(log_probs), axis=-1) + 1).astype(log_probs.dtype)


def _adaptive(log_probs, share):
    """Probability of the classes of lower rank + share of the class's own.

    Divided by what the probabilities add up to in float32, so that the last class scores exactly 1 in every row and in none
    is out or in by rounding.
    """
    order = _order(log_probs)
    probs = jnp.take_along_axis(jnp.exp(log_probs), order, -1)
    total = jnp.cumsum(probs, -1)
    before = jnp.concatenate([jnp.zeros_like(total[..., :1]), total[..., :-1]], -1)
    whole = jnp.where(share == 1, total, before + share * probs)
    return jnp.take_along_axis(whole / total[..., -1:], jnp.argsort(order, axis=-1), -1)


def _check_penalty(penalty) -> None:
    if not penalty >= 0:
        raise ValueError(f"`penalty` must be at least 0, got {penalty}. It is in units of probability for each rank.")


def _words(randomised: bool) -> str:
    return "randomised" if randomised else "not randomised"
