"""Guides of variational inference: the families that a posterior of the weights is sought in.

A guide is a function `(numpyro_model, *, init_loc_fn, init_scale) -> AutoGuide`, as NumPyro's own classes `AutoNormal`,
`AutoDiagonalNormal` and `AutoMultivariateNormal` are; your own is any such function. Training, and `sample_posterior`, must
draw from the same q: one whose training draws nothing is a guide without spread, as is `AutoLaplaceApproximation`, which
trains a point and then draws around it without having seen the data (use `laplace`). `key=None` needs its `median`. An
`init_scale` that is a member's own, and so traced, is for `normal` alone: NumPyro's other classes branch on theirs.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.core import Tracer

from bayescal.memory import device_budget
from bayescal.methods.map_estimate import check_whole

if TYPE_CHECKING:
    from numpyro.infer.autoguide import AutoGuide

Guide = Callable[..., "AutoGuide"]


def normal(numpyro_model: Callable, *, init_loc_fn: Callable, init_scale: Any) -> "AutoGuide":
    """q(w) = N(location, diag(scale^2)), mean field: two numbers a weight. NumPyro's `AutoNormal`.

    Variances come out too small where weights are correlated: the optimum of a normal posterior is 1 / diag(precision).

    Args:
        numpyro_model: samples the weights from the prior.
        init_loc_fn: NumPyro's strategy for the location at the start.
        init_scale: standard deviation at the start.
    """
    from numpyro.infer.autoguide import AutoNormal

    return AutoNormal(numpyro_model, init_loc_fn=init_loc_fn, init_scale=init_scale)


def low_rank(rank: int) -> Guide:
    """q(w) = N(location, S (F F^T + I) S) with S = diag(scale) and F of shape (weights, rank).

    NumPyro's `AutoLowRankMultivariateNormal`. The KL is sampled. F starts at zero, from where only the noise of the
    gradient moves it: a rate that falls too soon leaves it there.

    Args:
        rank: columns of F; rank + 2 numbers a weight.

    Raises:
        ValueError: for a rank below one.
    """
    check_whole("rank", rank, 1, "2 to 20 is usual.")

    def guide(numpyro_model, *, init_loc_fn, init_scale):
        from numpyro.infer.autoguide import AutoLowRankMultivariateNormal

        return AutoLowRankMultivariateNormal(numpyro_model, init_loc_fn=init_loc_fn, init_scale=init_scale, rank=rank)

    return guide


def full(numpyro_model: Callable, *, init_loc_fn: Callable, init_scale: Any) -> "AutoGuide":
    """q(w) = N(location, L L^T), L lower triangular: weights^2 / 2 numbers. NumPyro's `AutoMultivariateNormal`.

    For a few thousand weights. The KL is sampled.

    Args:
        numpyro_model, init_loc_fn, init_scale: as in `normal`.

    Raises:
        ValueError: with the number of bytes, where the matrices of a step do not fit the device.
    """
    from numpyro.handlers import seed, trace
    from numpyro.infer.autoguide import AutoMultivariateNormal

    shapes = jax.eval_shape(lambda key: _values(trace(seed(numpyro_model, key)).get_trace()), jax.random.key(0))
    size = sum(x.size for x in shapes.values())
    # old and new of L's triangle and of the optimiser's two moments, 3 squares, and some 6 that a step holds beside them
    need, budget = 9 * size**2 * max(x.dtype.itemsize for x in shapes.values()), device_budget()
    if need > budget:
        raise ValueError(
            f"`guides.full` must fit the device, got {size} weights, whose matrices take {need / 1e9:.1f} GB of "
            f"{budget / 1e9:.1f}. Use `guides.low_rank(10)`, `guides.normal`, or `subset` for fewer weights."
        )
    return AutoMultivariateNormal(numpyro_model, init_loc_fn=init_loc_fn, init_scale=init_scale)


def delta(numpyro_model: Callable, *, init_loc_fn: Callable, init_scale: Any) -> "AutoGuide":
    """q(w) = one network: maximum a posteriori under the prior, for comparison. NumPyro's `AutoDelta`.

    Its "KL" is -log p(w), up to the constant that a point has.

    Args:
        numpyro_model, init_loc_fn: as in `normal`.
        init_scale: not used; there is no spread.
    """
    from numpyro.infer.autoguide import AutoDelta

    return AutoDelta(numpyro_model, init_loc_fn=init_loc_fn)


def check_guide(guide: Any) -> None:
    """Raises unless it takes what a guide is given."""
    from numpyro.infer.autoguide import AutoGuide

    advice = "Pass `guides.normal`, `guides.low_rank(10)`, or a function that makes yours of these."
    wanted = "`guide` must be a function `(numpyro_model, *, init_loc_fn, init_scale) -> AutoGuide`"
    if not callable(guide) or isinstance(guide, AutoGuide):
        raise TypeError(f"{wanted}, got an instance of {type(guide).__name__}. {advice}")
    signature = inspect.signature(guide)
    try:
        signature.bind(None, init_loc_fn=None, init_scale=None)
    except TypeError as error:
        raise TypeError(f"{wanted}, got {getattr(guide, '__name__', 'one')}{signature}. {advice}") from error


def made(guide: Guide, numpyro_model: Callable, *, init_loc_fn: Callable, init_scale: Any) -> "AutoGuide":
    """NumPyro's guide of the model.

    Raises:
        TypeError: for a function that makes something else.
        ValueError: for a traced scale on which NumPyro's class branches.
    """
    from numpyro.infer.autoguide import AutoGuide

    try:
        result: Any = guide(numpyro_model, init_loc_fn=init_loc_fn, init_scale=init_scale)
    except jax.errors.TracerBoolConversionError as error:
        if not isinstance(init_scale, Tracer):
            raise
        raise ValueError(
            f"`initial_scale` must be a number for this guide, got a traced {init_scale.aval}. Only `guides.normal` takes "
            "one that is a member's own setting."
        ) from error
    if not isinstance(result, AutoGuide):
        raise TypeError(
            f"`guide` must make one of NumPyro's AutoGuides, got {type(result).__name__}. Pass `guides.normal`, or a "
            "function that returns, say, `AutoDiagonalNormal(numpyro_model, ...)`."
        )
    return result


def _values(trace: dict) -> dict[str, jax.Array]:
    return {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}
