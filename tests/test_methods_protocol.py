"""Every method keeps the protocol, alone and ensembled."""

import pytest
from methods import ENSEMBLED, cases

import bayescal as bc
from bayescal.testing import check_method

pytestmark = pytest.mark.core


@pytest.mark.parametrize("name", [name for name in cases() if name != "anchored"])
def test_method(name):
    check_method(*cases()[name]())


@pytest.mark.parametrize("name", [ENSEMBLED[0], *(pytest.param(n, marks=pytest.mark.slow) for n in ENSEMBLED[1:])])
def test_ensembled(name):
    method, model, data = cases()[name]()
    check_method(bc.ensemble(method, 3), model, data)
