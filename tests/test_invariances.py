"""What no metric may depend on: row order, how rows are split, names of classes, and whether a weight or a copy counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bayescal as bc
from bayescal import metrics as m

pytestmark = pytest.mark.core

ROWS, CLASSES = 60, 3
METRICS = {
    "accuracy": bc.accuracy(),
    "nll": bc.nll(),
    "brier": bc.brier(),
    "spherical": m.spherical_score(),
    "ece": bc.calibration_error(),
    "rmsce": bc.calibration_error(norm=2),
    "mce": bc.calibration_error(norm=float("inf")),
    "classwise": bc.classwise_calibration_error(),
    "conditional": m.top_label_conditional_calibration_error(),
    "smooth": bc.smooth_calibration_error(),
    "soft": m.soft_binned_calibration_error(),
    "avu": m.accuracy_versus_uncertainty(threshold=0.5),
    "gap": m.confidence_gap(),
    "equal_mass": bc.whole(m.equal_mass_calibration_error),
    "sweep": bc.whole(m.sweep_calibration_error),
    "ks": bc.whole(m.ks_error),
    "kuiper": bc.whole(m.kuiper_error),
    "mmce": bc.whole(m.mmce),
    "auroc": bc.whole(bc.auroc),
    "average_precision": bc.whole(bc.average_precision),
    "aurc": bc.whole(bc.aurc),
    "augrc": bc.whole(bc.augrc),
    "fpr": bc.whole(bc.fpr_at_tpr),
    "debiased": bc.calibration_error(debiased=True),
    "squared": bc.squared_calibration_error(),
    "z": m.spiegelhalter_z(),
}
DEPEND_ON_N = {"debiased", "squared", "z", "aurc"}  # by design: what is taken off, or the scale, is that of n rows
LOCKED = settings(max_examples=8, deadline=None, derandomize=True)


def data(seed):
    """Probabilities with ties between rows and none within; some confidences on the edges of bins."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(ROWS, CLASSES)), 1) + np.array([0.0, 0.03, 0.06])
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probs[:6] = np.array([0.6, 0.3, 0.1])[rng.permuted(np.tile(np.arange(3), (6, 1)), axis=1)]
    return probs.astype(np.float32), np.append(np.arange(CLASSES), rng.integers(0, CLASSES, ROWS - CLASSES)), rng


def values(probs, targets, weights=None, batch_size=2**16, names=METRICS):
    chosen = {name: METRICS[name]._replace(interval=None, regular=False) for name in names}  # the value alone
    found = bc.evaluate(bc.Probabilities(probs[None]), targets, chosen, weights=weights, batch_size=batch_size)
    return np.array([e.value for e in found.values()])


@LOCKED
@given(st.integers(0, 2**31), st.sampled_from([20, 7]))
def test_order_and_splits_do_not_matter(seed, batch_size):
    probs, targets, rng = data(seed)
    order = rng.permutation(ROWS)
    plain = values(probs, targets)
    np.testing.assert_allclose(values(probs[order], targets[order], batch_size=batch_size), plain, rtol=2e-5, atol=1e-6)


@LOCKED
@given(st.integers(0, 2**31))
def test_names_of_classes_do_not_matter(seed):
    probs, targets, rng = data(seed)
    name = rng.permutation(CLASSES)
    np.testing.assert_allclose(
        values(probs[:, np.argsort(name)], name[targets]), values(probs, targets), rtol=2e-5, atol=1e-6
    )


@LOCKED
@given(st.integers(0, 2**31))
def test_a_weight_is_so_many_copies(seed):
    probs, targets, rng = data(seed)
    counts = np.maximum(rng.multinomial(ROWS, np.full(ROWS, 1 / ROWS)), 0)
    copies = np.repeat(np.arange(ROWS), counts)
    names = [n for n in METRICS if n not in ("debiased", "squared", "z")]
    weighted = values(probs, targets, counts.astype(np.float32), names=names)
    np.testing.assert_allclose(weighted, values(probs[copies], targets[copies], names=names), rtol=2e-5, atol=1e-6)


@LOCKED
@given(st.integers(0, 2**31))
def test_all_rows_twice_is_the_same(seed):
    probs, targets, _ = data(seed)
    names = [n for n in METRICS if n not in DEPEND_ON_N]
    twice = values(np.tile(probs, (2, 1)), np.tile(targets, 2), names=names)
    np.testing.assert_allclose(twice, values(probs, targets, names=names), rtol=2e-5, atol=1e-6)
