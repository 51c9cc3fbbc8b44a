"""Metrics of ensembles: any metric member by member, how far the members disagree, and how well they predict together."""

import dataclasses
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.binning import namespace
from bayescal.metrics.likelihood import mean_metric
from bayescal.predictive import Categorical, Gaussian, Predictive, weighted_sum
from bayescal.types import Array, Metric, WholeMetric

Summary = Literal["mean", "spread", "excess", "each"]
WORDS = {
    "mean": "mean over members",
    "spread": "standard deviation over members",
    "excess": "mean over members less that of the pool",
    "each": "of each member",
}


class MemberSums(NamedTuple):
    """Sums of a metric for every member by itself.

    each: the metric's own sums, with a leading member axis.
    mass: weight of each member, (member,).
    pool: the metric's sums for the pool, or () where they are not asked for.
    """

    each: Any
    mass: Float[Array, "member"]
    pool: Any


@cache
def member_metric(metric: Metric | WholeMetric, *, summary: Summary = "mean") -> Metric | WholeMetric:
    """A metric of every member by itself, summed up: sum_s W_s metric(member s), or its spread, or less the pool's.

    A member's rows weigh by row weight times member weight, and W_s is the share of their sum: a member of weight 0
    counts for nothing, and one that was dropped for some rows is measured on the others. Interval by influence, of "mean"
    and "excess" where the metric is regular: over rows, given the members.

    Args:
        metric: streaming or of whole columns, such as `nll()` or `whole(auroc)`.
        summary: "mean"; "spread", the standard deviation (divided by members - 1; 1 - sum of squared shares where they
            differ; NaN for one member); "excess", mean - metric(pool): what pooling gains of a metric that is better when
            lower; "each", the values (member,), NaN at weight 0, for `compute` of measured sums and not for `evaluate`.

    Raises:
        ValueError: for another summary.
    """
    if summary not in WORDS:
        raise ValueError(f"`summary` must be one of {', '.join(map(repr, WORDS))}, got {summary!r}. Take 'mean'.")
    words = f"{WORDS[summary]}; {metric.convention}"
    better = metric.better if summary in ("mean", "each") else "neither"
    facts = {"convention": words, "better": better, "regular": metric.regular and summary in ("mean", "excess")}
    if isinstance(metric, WholeMetric):
        return _whole_member_metric(metric, summary, facts)

    def measure(pred, targets, weights):
        bare, share = _members(pred)
        each = jax.lax.map(lambda one: metric.measure(_alone(one[0]), targets, weights * one[1]), (bare, share))
        pool = metric.measure(pred, targets, weights) if summary == "excess" else ()
        return MemberSums(each, (weights * share).sum(-1), pool)

    def compute(sums: MemberSums):
        xp, mass = namespace(sums.mass), sums.mass
        # A member of weight 0 has no rows: the metric is undefined there, and so is its slope. Another stands in for it.
        used = xp.where(mass > 0, xp.arange(len(mass)), mass.argmax())
        filled = jax.tree.map(lambda x: x[used], sums.each)
        if xp is np:
            values = np.stack([metric.compute(jax.tree.map(lambda x, s=s: x[s], filled)) for s in range(len(mass))])
        else:
            values = jax.vmap(metric.compute)(filled)
        return _summed_up(values, mass, summary, metric.compute(sums.pool) if summary == "excess" else None)

    return Metric(measure, compute, **facts)


@cache
def disagreement(*, against: Literal["pairs", "pool"] = "pairs") -> Metric:
    """Share of rows on which two members have different top labels, mean over pairs of members.

    In [0, 1]; neither direction is better; 0 = the members always agree. Ties of classes go to the lowest index. Interval:
    normal, 95 %.

    Args:
        against: "pairs" of different members, weighted by the product of their weights, NaN for one member; or each
            member against the "pool".

    Raises:
        ValueError: for another word.
    Source: Lakshminarayanan et al. 2017 and Fort et al. 2019 have kinds of it (recalled, formula not checked).
    """
    if against not in ("pairs", "pool"):
        raise ValueError(f"`against` must be 'pairs' or 'pool', got {against!r}. 'pairs' compares members.")

    def score(pred, targets):
        log_probs, weights = _class_log_probs(pred)
        labels = log_probs.argmax(-1)
        if against == "pool":
            return weighted_sum((labels != pred.top_label()[1][None]).astype(weights.dtype), weights)
        votes = weighted_sum(jax.nn.one_hot(labels, log_probs.shape[-1], dtype=weights.dtype), weights[..., None])
        total = votes.sum(-1, keepdims=True)  # as it was added up: exactly a vote when all agree
        return (votes * (total - votes)).sum(-1) / _pairs(weights)

    words = {"pairs": "mean over pairs of different members", "pool": "each member against the pool"}
    return mean_metric(score, f"top labels; {words[against]}")._replace(better="neither")


@cache
def diversity() -> Metric:
    """Mean KL(p_s || p_t) over ordered pairs of different members, nats per example; higher = more diverse.

    At least 0; infinite where a member rules out a class that another does not; NaN for one member. In time linear in the
    number of members: sum_st w_s w_t KL(p_s || p_t) = sum_k cov_s(p_sk, log p_sk). Interval: normal, 95 %.
    """

    def score(pred, targets):
        log_probs, weights = _class_log_probs(pred)
        counts = weights[..., None] != 0
        possible = (log_probs != -jnp.inf) & counts  # true for NaN, which must come through
        weights = jnp.broadcast_to(weights[..., None], log_probs.shape)
        reference = jnp.where(possible, log_probs, -jnp.inf).max(0)
        off = jnp.where(
            possible, log_probs - jnp.where(possible, reference, 0), 0
        )  # differences: digits of close members
        pull = jnp.where(possible, jnp.exp(jnp.where(possible, reference, 0)) * jnp.expm1(off), 0)
        centred = off - weighted_sum(off, weights)
        covariance = weighted_sum((pull - weighted_sum(pull, weights)) * centred, weights)
        some, every = possible.any(0), (possible | ~counts).all(0)
        return jnp.where(every, covariance, jnp.where(some, jnp.inf, 0)).sum(-1) / _pairs(weights[..., 0])

    return mean_metric(score, "mean pairwise KL over ordered pairs of different members, nats")._replace(
        better="neither"
    )


def _members(pred: Predictive):
    """The predictive without member weights, and those, (member, rows), of mean one."""
    shape = (pred.num_members, *pred.batch_shape)
    if pred.member_weights is None:
        return pred, jnp.ones(shape, jnp.float32)
    return dataclasses.replace(pred, member_weights=None), jnp.broadcast_to(pred.weights() * shape[0], shape)


def _alone(member: Predictive) -> Predictive:
    """One member, whose arrays have lost the member axis, as a predictive."""
    return jax.tree.map(lambda x: x[None], member)


@np.errstate(invalid="ignore")  # infinite scores have no spread or excess: NaN
def _summed_up(values, mass, summary: Summary, pool):
    xp = namespace(values)
    if summary == "each":
        return xp.where(mass > 0, values, xp.nan)
    share = mass / mass.sum()
    mean = xp.where(share > 0, share * values, 0).sum()
    if summary == "mean":
        return mean
    if summary == "excess":
        return mean - pool
    left = 1 - (share**2).sum()
    square = xp.where(share > 0, share * (values - mean) ** 2, 0).sum()
    return xp.where(left > 1e-6, square / xp.where(left > 1e-6, left, 1), xp.nan) ** 0.5


def _whole_member_metric(metric: WholeMetric, summary: Summary, facts) -> WholeMetric:
    def read(pred, targets):
        bare, share = _members(pred)
        each = jax.lax.map(lambda one: tuple(metric.read(_alone(one), targets)), bare)
        pool = tuple(metric.read(pred, targets)) if summary == "excess" else ()
        return share.T, *(jnp.moveaxis(x, 0, 1) for x in each), *pool

    def compute(share, *columns_and_weights):
        *columns, weights = columns_and_weights
        weights = jnp.ones(len(share), jnp.float32) if weights is None else weights
        number = len(columns) // 2 if summary == "excess" else len(columns)
        of_members = share.T * weights
        mass = of_members.sum(-1)
        used = jnp.where(mass > 0, jnp.arange(len(mass)), mass.argmax())  # as above
        each = tuple(jnp.moveaxis(x, 1, 0)[used] for x in columns[:number])
        values = jax.lax.map(lambda one: metric.compute(*one[0], one[1]), (each, of_members[used]))
        return _summed_up(
            values, mass, summary, metric.compute(*columns[number:], weights) if number < len(columns) else None
        )

    return WholeMetric(read, compute, **facts)


def _class_log_probs(pred: Predictive):
    """Log-probabilities (member, rows, classes) and member weights (member, rows)."""
    if isinstance(pred, Gaussian):
        raise TypeError(
            "`pred` must be of classes, got Gaussian. How its members differ is `decompose(pred).epistemic`."
        )
    log_probs = (pred if isinstance(pred, Categorical) else pred.as_categorical()).member_log_probs()
    return log_probs, jnp.broadcast_to(pred.weights(), log_probs.shape[:-1])


def _pairs(weights):
    """Sum over ordered pairs of different members of w_s w_t; NaN for a single one."""
    total = weights.sum(0)
    left = weighted_sum(total[None] - weights, weights)
    return jnp.where((weights > 0).sum(0) > 1, left, jnp.nan)
