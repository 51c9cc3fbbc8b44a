"""Online conformal prediction: loops in float64, coverage on a drifting stream, and what stops a run."""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformal_bands import ALPHAS

import bayescal as bc
from bayescal.conformal import aci, agaci, dtaci, fit_split, lac, local_coverage, rank, run_online, sf_ogd
from bayescal.conformal.window import slide, start_window

pytestmark = pytest.mark.core

GAMMAS = (0.0021, 0.0113, 0.0537)  # off the lattice of 1 / (window + 1), where float32 and float64 could part
METHODS = {
    "aci": lambda alpha, window=60: aci(alpha=alpha, gamma=0.0113, window=window),
    "agaci": lambda alpha, window=60: agaci(alpha=alpha, window=window, bounds=(0.0, 8.0), gammas=GAMMAS),
    "dtaci": lambda alpha, window=60: dtaci(alpha=alpha, window=window, horizon=100, gammas=GAMMAS),
    "sf_ogd": lambda alpha, window=60: sf_ogd(alpha=alpha, step_size=0.7, start=0.5),
}


def quantile(kept, alpha):
    """Threshold of a list of scores by sorting it."""
    if alpha <= 0:
        return math.inf
    if alpha >= 1:
        return -math.inf
    k = math.ceil((len(kept) + 1) * (1 - alpha) - 1e-9)
    return sorted(kept)[k - 1] if k <= len(kept) else math.inf


def loop_aci(scores, alpha, gamma, window):
    level, thresholds, levels = alpha, [], []
    for t, score in enumerate(scores):
        q = quantile(scores[max(0, t - window) : t], level)
        thresholds.append(q)
        levels.append(level)
        level += gamma * (alpha - (score > q))
    return thresholds, levels


def boa_rate(largest, squares, experts):
    return min(1 / (largest or 1), math.sqrt(math.log(experts) / squares) if squares else math.inf)


def loop_agaci(scores, alpha, gammas, window, bounds):
    experts = len(gammas)
    levels, total, squares, largest = [alpha] * experts, [0.0] * experts, [0.0] * experts, 0.0
    thresholds, pooled_levels = [], []
    for t, score in enumerate(scores):
        own = [quantile(scores[max(0, t - window) : t], level) for level in levels]
        finite = [min(max(q, bounds[0]), bounds[1]) for q in own]
        rates = [boa_rate(largest, v, experts) for v in squares]
        raw = [eta * math.exp(eta * r) for eta, r in zip(rates, total, strict=True)]
        weights = [w / sum(raw) for w in raw]
        q = sum(w * f for w, f in zip(weights, finite, strict=True))
        thresholds.append(q)
        pooled_levels.append(sum(w * level for w, level in zip(weights, levels, strict=True)))
        slope = alpha - (score > q)
        regrets = [slope * (q - f) for f in finite]
        largest = max(largest, *map(abs, regrets))
        squares = [v + r * r for v, r in zip(squares, regrets, strict=True)]
        for k, r in enumerate(regrets):
            eta = boa_rate(largest, squares[k], experts)
            total[k] += (r - eta * r * r + largest * (eta * r > 0.5)) / 2
            levels[k] += gammas[k] * (alpha - (score > own[k]))
    return thresholds, pooled_levels


def loop_dtaci(scores, alpha, gammas, window, horizon):
    experts = len(gammas)
    levels, weights, thresholds, pooled_levels = [alpha] * experts, [1.0] * experts, [], []
    spread = (1 - alpha) ** 2 * alpha**3 + alpha**2 * (1 - alpha) ** 3
    eta = math.sqrt(3 / horizon) * math.sqrt((math.log(experts * horizon) + 2) / spread)
    sigma = 1 / (2 * horizon)
    for t, score in enumerate(scores):
        kept = scores[max(0, t - window) : t]
        level = sum(w * a for w, a in zip(weights, levels, strict=True)) / sum(weights)
        thresholds.append(quantile(kept, level))
        pooled_levels.append(level)
        beta = (1 + sum(s >= score for s in kept)) / (len(kept) + 1)
        losses = [alpha * (beta - a) - min(0, beta - a) for a in levels]
        moved = [w * math.exp(-eta * loss) for w, loss in zip(weights, losses, strict=True)]
        weights = [(1 - sigma) * w + sum(moved) * sigma / experts for w in moved]
        levels = [a + g * (alpha - (score > quantile(kept, a))) for a, g in zip(levels, gammas, strict=True)]
    return thresholds, pooled_levels


def loop_sf_ogd(scores, alpha, step_size, start):
    q, squares, thresholds = start, 0.0, []
    for score in scores:
        thresholds.append(q)
        gradient = alpha - (score > q)
        squares += gradient**2
        q -= step_size * gradient / math.sqrt(squares)
    return thresholds, [math.nan] * len(scores)


@cache
def at_a_fifth(name):
    """One method for several tests, whose program is then compiled once."""
    return METHODS[name](0.2)


LOOPS = {
    "aci": lambda s, alpha: loop_aci(s, alpha, 0.0113, 60),
    "agaci": lambda s, alpha: loop_agaci(s, alpha, GAMMAS, 60, (0.0, 8.0)),
    "dtaci": lambda s, alpha: loop_dtaci(s, alpha, GAMMAS, 60, 100),
    "sf_ogd": lambda s, alpha: loop_sf_ogd(s, alpha, 0.7, 0.5),
}


@pytest.mark.parametrize("name", METHODS)
def test_equals_a_loop(name, rng):
    scores = abs(rng.normal(size=500) * np.linspace(1, 2, 500)).astype(np.float32)
    thresholds, levels = LOOPS[name]([float(s) for s in scores], 0.1037)
    run = run_online(METHODS[name](0.1037), scores)
    np.testing.assert_allclose(run.thresholds, thresholds, rtol=2e-4)
    np.testing.assert_allclose(run.alphas, levels, atol=1e-5)
    np.testing.assert_array_equal(run.covered, scores <= np.asarray(thresholds, np.float32))
    assert 0.05 < 1 - run.covered.mean() < 0.16  # it is a stream with misses


def test_aci_by_hand():
    """alpha 1/2, step 1/4, window of 2: the sixth score sees 3 and 0 of the last two."""
    run = run_online(aci(alpha=0.5, gamma=0.25, window=2), np.array([1.0, 2.0, 4.0, 3.0, 0.0, 5.0], np.float32))
    # alpha 0.5 (none yet) -> .625 (of 1: k = 1) -> .5 (of 1 2: k = 2) -> .375 (of 2 4: k = 2) -> .5 -> .625 (of 3 0: k = 2)
    np.testing.assert_array_equal(run.alphas, [0.5, 0.625, 0.5, 0.375, 0.5, 0.625])
    np.testing.assert_array_equal(run.thresholds, [np.inf, 1, 2, 4, 4, 3])
    np.testing.assert_array_equal(run.covered, [1, 0, 0, 1, 1, 0])


@pytest.mark.parametrize("name", ["agaci", "dtaci"])
def test_experts_are_averaged_in_full_precision(name):
    """A matrix product has 10 bits on accelerators, and a level of 0.1 would be off by 1e-4."""
    method = METHODS[name](0.1)
    state = method.init(jnp.zeros(0))
    for function in (method.threshold, lambda state: method.update(state, jnp.float32(1))):
        assert "dot_general" not in str(jax.make_jaxpr(function)(state))


def test_window_is_the_sorted_tail(rng):
    scores = rng.normal(size=40).round(1).astype(np.float32)  # with ties
    window = start_window(jnp.asarray(scores[:3]), 7)
    for t in range(3, 40):
        window = slide(window, jnp.asarray(scores[t]))
        kept = np.sort(scores[max(0, t - 6) : t + 1])
        np.testing.assert_array_equal(window.ordered[: len(kept)], kept)
        assert np.isinf(window.ordered[len(kept) :]).all() and window.count == t + 1
    np.testing.assert_array_equal(np.sort(window.recent), window.ordered)


@pytest.mark.parametrize("name", METHODS)
def test_resumes_to_the_bit_and_steps_alone(name, rng):
    scores = rng.exponential(size=120).astype(np.float32)
    method = at_a_fifth(name)
    whole = run_online(method, scores)
    first = run_online(method, scores[:60])
    second = run_online(method, scores[60:], state=first.state)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(second.state), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole.thresholds, np.concatenate([first.thresholds, second.thresholds]))
    state, read, update = method.init(jnp.zeros(0)), jax.jit(method.threshold), jax.jit(method.update)
    for t in range(5):
        np.testing.assert_allclose(read(state)[0], whole.thresholds[t], rtol=1e-6)
        state = update(state, jnp.asarray(scores[t]))


@pytest.mark.parametrize("name", METHODS)
def test_streams_side_by_side(name, rng):
    scores = rng.exponential(size=(3, 60)).astype(np.float32)
    method = at_a_fifth(name)
    together = jax.vmap(lambda s: run_online(method, s))(scores)
    for i in range(3):
        alone = run_online(method, scores[i])
        np.testing.assert_allclose(together.thresholds[i], alone.thresholds, rtol=1e-5)
        np.testing.assert_array_equal(together.covered[i], alone.covered)


def test_steps_side_by_side(rng):
    scores = rng.exponential(size=90).astype(np.float32)
    run = jax.vmap(lambda gamma: run_online(aci(alpha=0.2, gamma=gamma, window=30), scores).thresholds)
    for gamma, got in zip((0.01, 0.1), run(jnp.array([0.01, 0.1])), strict=True):
        np.testing.assert_array_equal(got, run_online(aci(alpha=0.2, gamma=gamma, window=30), scores).thresholds)


def test_past_scores_are_the_first_window(rng):
    past, scores = rng.exponential(size=99).astype(np.float32), rng.exponential(size=5).astype(np.float32)
    run = run_online(aci(alpha=0.1, gamma=0.01, window=200), scores, past=past)
    assert run.thresholds[0] == np.sort(past)[rank(99, 0.1) - 1]
    short = run_online(aci(alpha=0.1, gamma=0.01, window=19), scores, past=past)
    assert short.thresholds[0] == np.sort(past[-19:])[rank(19, 0.1) - 1]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("rows", [9, 19, 99, 199, 499])
def test_rank_is_exact_on_the_lattice(rows, alpha):
    """(rows + 1) alpha is a whole number in most cases, and float32 of alpha lies beside it."""
    past = np.arange(1, rows + 1, dtype=np.float32)
    k = rank(rows, alpha)
    first = run_online(aci(alpha=alpha, gamma=0.01, window=rows), np.ones(1, np.float32), past=past).thresholds[0]
    assert first == (k if k <= rows else np.inf)


def test_infinite_and_empty_sets():
    """Misses drive alpha to zero or below, and the set is everything; hits above one, and it is empty."""
    method = aci(alpha=0.5, gamma=0.4, window=50)
    rising = run_online(method, np.arange(60, dtype=np.float32))  # each beyond all before it
    everything = np.asarray(rising.alphas) <= 0
    assert everything.any() and np.isposinf(rising.thresholds[everything]).all()
    assert not np.isposinf(rising.thresholds[np.asarray(rising.alphas) * np.minimum(np.arange(60) + 1, 51) > 1]).any()
    assert (rising.covered[np.isposinf(rising.thresholds)] == 1).all()
    falling = run_online(method, -np.arange(60, dtype=np.float32))
    empty = np.asarray(falling.alphas) >= 1
    assert empty.any() and np.isneginf(falling.thresholds[empty]).all() and (falling.covered[empty] == 0).all()
    for run in (rising, falling):  # the theorem holds for both
        assert abs(float(run.covered.mean()) - 0.5) <= (0.5 + 0.4) / (0.4 * 60)
    pred = bc.Categorical(np.zeros((1, 60, 3), np.float32))
    assert not np.asarray(lac().region(pred, falling.thresholds[:, None], None))[empty].any()
    assert np.asarray(lac().region(pred, rising.thresholds[:, None], None))[everything].all()


def drifting(steps=10_000):
    """Absolute residuals whose variance doubles, with a sudden shift of the mean half way."""
    noise = np.random.default_rng(3).normal(size=steps) * np.sqrt(np.linspace(1, 2, steps))
    return abs(noise + 1.5 * (np.arange(steps) >= steps // 2)).astype(np.float32)


STREAM, STEPS, STRETCH = drifting(), 10_000, 500
ON_STREAM = {
    "aci": lambda alpha: aci(alpha=alpha, gamma=0.01, window=500),
    "agaci": lambda alpha: agaci(alpha=alpha, window=500, bounds=(0.0, 12.0)),
    "dtaci": lambda alpha: dtaci(alpha=alpha, window=500),
    "sf_ogd": lambda alpha: sf_ogd(alpha=alpha, step_size=4.0),
}


def slack(name, alpha, run):
    """What the long-run coverage may differ by: theorems where there are some, else 0.01, where up to 0.004 was seen."""
    if name == "aci":
        return (max(alpha, 1 - alpha) + 0.01) / (0.01 * STEPS)
    if name == "sf_ogd":
        q = np.append(run.thresholds, run.state.threshold)
        return float(np.ptp(q) * math.sqrt(run.state.squares) / (4.0 * STEPS)) * (1 + 1e-5)
    return 0.01


@pytest.mark.parametrize(
    ("name", "alpha"),
    [
        pytest.param(name, alpha, marks=() if alpha == 0.1 or name == "aci" else pytest.mark.slow)
        for name in ON_STREAM
        for alpha in ALPHAS
    ],
)
def test_keeps_coverage_where_a_fixed_threshold_does_not(name, alpha, record_property):
    run = run_online(ON_STREAM[name](alpha), STREAM)
    fixed = np.sort(STREAM[:500])[rank(500, alpha) - 1]
    fixed_covered = (fixed >= STREAM).astype(np.float32)
    error, fixed_error = (abs(float(np.mean(c)) - (1 - alpha)) for c in (run.covered, fixed_covered))
    assert error <= slack(name, alpha, run)
    assert fixed_error > max(0.04, 4 * error)
    local = np.asarray(local_coverage(run.covered, width=STRETCH))
    record_property("coverage", 1 - alpha - error)
    record_property("worst local coverage", float(local.min()))
    fixed_local = np.asarray(local_coverage(jnp.asarray(fixed_covered), width=STRETCH))
    assert abs(local[STRETCH:] - (1 - alpha)).mean() < 0.5 * abs(fixed_local[STRETCH:] - (1 - alpha)).mean()
    assert local.min() > fixed_local.min()


def test_the_theorem_of_aci_holds_for_any_stream(rng):
    """A stream that answers each threshold with a score just above it while it can."""
    method, state, missed = aci(alpha=0.1, gamma=0.05, window=20), None, 0
    state, steps = method.init(jnp.zeros(0)), 200
    read, update = jax.jit(method.threshold), jax.jit(method.update)
    for _ in range(steps):
        q = float(read(state)[0])
        score = 1.0 if math.isinf(q) else q + 1e-3
        missed += score > q
        state = update(state, jnp.float32(score))
    assert abs(missed / steps - 0.1) <= (0.9 + 0.05) / (0.05 * steps)


def test_local_coverage_by_hand(unchecked):
    covered = jnp.array([1.0, 0.0, 1.0, 1.0])
    np.testing.assert_allclose(local_coverage(covered, width=2), [0.5, 0.5, 1])
    for width in (0, 5):
        with pytest.raises(ValueError, match=r"`width` must lie in \[1, 4\]"):
            local_coverage(covered, width=width)


def test_through_a_score_of_classes(rng):
    """The threshold of split conformal is where ACI starts, given the same calibration scores."""
    logits = (2 * rng.normal(size=(1, 400, 4))).astype(np.float32)
    targets = (logits[0] + rng.gumbel(size=(400, 4))).argmax(1)
    pred, new = bc.Categorical(logits[:, :300]), bc.Categorical(logits[:, 300:])
    scores = lac().measure(pred, targets[:300], None)
    run = run_online(aci(alpha=0.1, gamma=0.01, window=300), lac().measure(new, targets[300:], None), past=scores)
    assert run.thresholds[0] == fit_split(pred, targets[:300], lac(), alpha=0.1).threshold
    sets = np.asarray(lac().region(new, run.thresholds[:, None], None))
    np.testing.assert_array_equal(sets[np.arange(100), targets[300:]], run.covered == 1)


@pytest.mark.parametrize("name", METHODS)
def test_a_score_that_is_nan_stays_one(name, rng):
    scores = rng.exponential(size=60).astype(np.float32)
    scores[20] = np.nan
    run = jax.jit(lambda s: run_online(at_a_fifth(name), s))(scores)
    assert np.isnan(run.covered[20:]).all() and np.isnan(run.thresholds[21:]).all()
    assert np.isfinite(run.covered[:20]).all()


def wrong(*values) -> Any:
    """Values that no type checker would let through."""
    return values


def test_bad_input(unchecked):
    for alpha in wrong(0, 1, -0.1, float("nan"), "0.1"):
        for build in METHODS.values():
            with pytest.raises(ValueError, match="`alpha` must be the miscoverage wanted"):
                build(alpha)
    for step in wrong(0, -1.0, float("nan"), math.inf, "0.1"):
        with pytest.raises(ValueError, match="`gamma` must be a positive finite number"):
            aci(alpha=0.1, gamma=step, window=5)
        with pytest.raises(ValueError, match="`gammas` must be a positive finite number"):
            dtaci(alpha=0.1, window=5, gammas=(0.1, step))
        with pytest.raises(ValueError, match="`step_size` must be a positive finite number"):
            sf_ogd(alpha=0.1, step_size=step)
        with pytest.raises(ValueError, match="`horizon` must be a positive finite number"):
            dtaci(alpha=0.1, window=5, horizon=step)
    with pytest.raises(ValueError, match="`gammas` must be two steps or more, got 1"):
        agaci(alpha=0.1, window=5, bounds=(0, 1), gammas=(0.1,))
    for bounds in ((1, 0), (0, math.inf), (math.nan, 1)):
        with pytest.raises(ValueError, match="`bounds` must be finite and ascending"):
            agaci(alpha=0.1, window=5, bounds=bounds)
    scores = np.ones(3, np.float32)
    for window in wrong(0, -1, 2.5):
        with pytest.raises(ValueError, match="`window` must be a whole number of scores"):
            run_online(aci(alpha=0.1, gamma=0.1, window=window), scores)
    method = aci(alpha=0.1, gamma=0.1, window=5)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="`scores` must be finite, got 1 of 2"):
            run_online(method, np.array([1, bad], np.float32))
        with pytest.raises(ValueError, match="`past` must be finite, got 1 of 2"):
            run_online(method, scores, past=np.array([1, bad], np.float32))
    with pytest.raises(ValueError, match=r"`scores` must have shape \(time,\), got \(3, 1\)"):
        run_online(method, scores[:, None])
    with pytest.raises(ValueError, match="`past` must be None with a `state`"):
        run_online(method, scores, past=scores, state=method.init(jnp.zeros(0)))
    with pytest.raises(ValueError, match="`past` must be empty for SF-OGD"):
        run_online(sf_ogd(alpha=0.1, step_size=1.0), scores, past=scores)
