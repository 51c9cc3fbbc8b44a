"""Joint log-likelihood: how well an ensemble predicts several rows together, which its pooled rows do not tell."""

from functools import cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.binning import Z95
from bayescal.predictive import Predictive, float32_or_wider, log_pool, weighted_sum
from bayescal.types import Array, Key, WholeMetric

Per = Literal["row", "block"]


def joint_log_prob(pred: Predictive, targets: Array) -> Float[jax.Array, "*blocks"]:
    """Log-probability of all targets of a block together, log sum_s w_s prod_t p_s(y_t), nats per block.

    At most 0 for classes; the sum of `pred.log_prob` for one member, whose rows are independent.

    Args:
        pred: predictive with batch shape (*blocks, rows of a block).
        targets: as the family wants them.

    Raises:
        ValueError: for member weights that may differ within a block, which leave no joint distribution.
    Source: Osband et al. 2022 (recalled, formula not checked against the paper).
    """
    return log_pool(pred.member_log_prob(targets).sum(-1), _block_weights(pred)[..., 0])


def joint_nll(*, tau: int = 10, per: Per = "row", key: Key | None = None) -> WholeMetric:
    """Joint negative log-likelihood, -mean over blocks of log sum_s w_s prod_t p_s(y_t), blocks of `tau` different rows.

    Nats; lower is better. `nll` for tau = 1, and for one member; below it where the members know what of one row tells
    about another. Rows of weight 0 are left out before blocks are formed, a block weighs by the product of its rows'
    weights, and rows that fill no block are left out; NaN without any block. Interval: normal over blocks, 95 %.

    Args:
        tau: rows of a block.
        per: "row" divides by tau, to be compared with `nll`; "block" does not, as in the paper's code.
        key: order in which rows are put into blocks; None = as they are given, consecutive.

    Raises:
        ValueError: for a tau below 1 or another `per`; when measured, for member weights that differ between rows.
    Source: Osband et al. 2022, The Neural Testbed (recalled, formula not checked against the paper).
    """
    return _joint_metric(tau, tau, per, *_hashable(key))


def dyadic_nll(*, tau: int = 10, per: Per = "row", key: Key | None = None) -> WholeMetric:
    """Dyadic joint negative log-likelihood: of blocks of `tau` rows, each drawn at random from a pair of rows.

    -mean over pairs of sum_c Binomial(c; tau, 1/2) log sum_s w_s p_s(y_1)^c p_s(y_2)^(tau - c): the expectation over
    draws, instead of one draw. Nats; lower is better. In high dimensions two rows repeated tell members apart where
    `tau` different ones would not. Otherwise as `joint_nll`, with pairs for blocks.

    Args:
        tau: rows of a block, drawn with replacement.
        per: "row" divides by tau; "block" does not, as in the paper's code.
        key: order in which rows are paired; None = as they are given, consecutive.

    Raises:
        ValueError: as `joint_nll`.
    Source: Osband et al. 2022, Evaluating high-order predictive distributions in deep learning (recalled, formula not
        checked against the paper; the paper's code draws instead of taking the expectation).
    """
    return _joint_metric(tau, 2, per, *_hashable(key))


@cache
def _joint_metric(tau: int, anchors: int, per: Per, key_data: tuple[int, ...] | None, key_kind) -> WholeMetric:
    if not isinstance(tau, int) or tau < 1:
        raise ValueError(f"`tau` must be a whole number of at least 1, got {tau!r}. The usual is 10.")
    if per not in ("row", "block"):
        raise ValueError(f"`per` must be 'row' or 'block', got {per!r}. 'row' compares with `nll`.")
    dyadic = anchors != tau
    repeats, chances = _repetitions(tau) if dyadic else (np.ones((1, anchors)), np.ones(1))
    scale = tau if per == "row" else 1

    def order(rows):
        if key_data is None:
            return jnp.arange(rows)
        key = jax.random.wrap_key_data(jnp.asarray(key_data, jnp.uint32), impl=key_kind)
        return jax.random.permutation(key, rows)

    def blocks(log_prob, member_weight, weights):
        """Joint NLL and weight of each block."""
        rows = len(log_prob)
        weights = jnp.ones(rows, jnp.float32) if weights is None else jnp.asarray(weights)
        place = order(rows)
        place = place[jnp.argsort(weights[place] == 0, stable=True)][: rows // anchors * anchors].reshape(-1, anchors)
        share = (weights / weights.max())[place].prod(-1)  # no over- or underflow of products of a common scale
        counts = member_weight[place[:, 0]].T[None]  # (1, member, blocks)
        given = jnp.asarray(repeats, log_prob.dtype)[:, None, None, :]  # (draws, 1, 1, anchors)
        each = jnp.moveaxis(log_prob[place], -1, 0)[None]  # (1, member, blocks, anchors)
        together = jnp.where(given == 0, 0, given * each).sum(-1)  # 0 times an impossible row is nothing
        value = -jax.vmap(log_pool)(together, jnp.broadcast_to(counts, together.shape))
        return weighted_sum(value, jnp.asarray(chances, value.dtype)[:, None]) / scale, share

    def read(pred, targets):
        log_prob = float32_or_wider(pred.member_log_prob(targets)).T
        return log_prob, jnp.broadcast_to(_block_weights(pred).T, log_prob.shape)

    def compute(log_prob, member_weight, weights):
        value, share = blocks(log_prob, member_weight, weights)
        return jnp.where(share == 0, 0, share * value).sum() / share.sum()

    compiled = jax.jit(blocks)

    def interval(log_prob, member_weight, weights):
        value, share = (np.asarray(x, np.float64) for x in compiled(log_prob, member_weight, weights))
        kept = share > 0
        if kept.sum() < 2 or not np.isfinite(value[kept]).all():
            return None, None
        share = share[kept] / share[kept].sum()
        mean = share @ value[kept]
        half = Z95 * np.sqrt(share @ (value[kept] - mean) ** 2 * (share**2).sum())
        return mean - half, mean + half

    kind = f"pairs, each row drawn {tau} times from its pair in expectation" if dyadic else f"blocks of {tau}"
    how = "consecutive rows" if key_data is None else "rows in random order"
    words = f"{kind}; {how}; nats per {per}, no clipping"
    return WholeMetric(read, compute, interval, words, regular=False)  # blocks are independent, their rows are not


def _block_weights(pred: Predictive):
    """Member weights with the last batch axis of size one.

    Raises:
        ValueError: where they differ along it.
    """
    weights = pred.weights()
    if weights.shape[-1] != 1:
        raise ValueError(
            f"`member_weights` must be the same for all rows of a block, got shape {weights.shape}. Rows with other "
            "members have no joint distribution: use members that predict every row."
        )
    return weights


def _repetitions(tau: int):
    """(how often each of two rows is drawn, how likely that is), for the tau + 1 outcomes."""
    from math import comb

    first = np.arange(tau + 1)
    return np.stack([first, tau - first], -1), np.array([comb(tau, int(c)) for c in first]) / 2.0**tau


def _hashable(key: Key | None):
    """The key's numbers and kind, so that the same settings give the same metric."""
    if key is None:
        return None, None
    return tuple(np.asarray(jax.random.key_data(key)).tolist()), jax.random.key_impl(key)
