"""Every method keeps the protocol, alone and ensembled."""

import pytest
from methods import ENSEMBLED, FULL_BATCH, ROWS, SLOW, cases

import bayescal as bc
from bayescal.testing import check_method

pytestmark = pytest.mark.core


def marked(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("name", marked([name for name in cases() if name != "tethered"], SLOW))  # the README checks it
def test_method(name):
    check_method(*cases()[name](), batch_size=ROWS if name in FULL_BATCH else None)


@pytest.mark.parametrize("name", marked(ENSEMBLED, ENSEMBLED[1:]))
def test_ensembled(name):
    method, model, data = cases()[name]()
    check_method(bc.ensemble(method, 3), model, data, batch_size=ROWS if name in FULL_BATCH else None)
