"""Plain functions of whole columns as metrics that `evaluate` takes."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from bayescal.metrics.events import Events, top_label
from bayescal.types import WholeMetric


class Facts(NamedTuple):
    """What a figure needs beside its value; see `WholeMetric`."""

    convention: str
    better: str
    regular: bool
    order_statistic: bool
    interval: Callable[..., tuple[Any, Any]] | None


_FACTS: dict[Callable, Facts] = {}


def stated(
    convention: str, *, better: str = "lower", regular: bool = True, order_statistic: bool = False, interval=None
):
    """Decorator: states the convention of a function `(probability, outcome, *, weights, **settings) -> value`.

    Args:
        convention: what differs in the field (ties, estimator, bins), in words.
        better: "lower", "higher" or "neither".
        regular, order_statistic: as in `WholeMetric`.
        interval: `(probability, outcome, *, weights, **settings) -> (low, high)` at 95 %; None = by influence.
    """

    def keep(function):
        _FACTS[function] = Facts(convention, better, regular and not order_statistic, order_statistic, interval)
        return function

    return keep


@cache
def whole(function: Callable, events: Events | None = None, **settings) -> WholeMetric:
    """The metric that applies a plain function of this package to events: `whole(aurc)`, `whole(auroc, one_class(1))`.

    Args:
        function: `(probability, outcome, *, weights, **settings) -> value`, one that states its convention.
        events: which events; default the top label (confidence, correctness).
        settings: of the function; they go into the convention, with the defaults of those left out.

    Raises:
        TypeError: for a function that does not state its convention, or a setting that it does not have.
    """
    if function not in _FACTS:
        raise TypeError(
            f"`function` must be one of bayescal.metrics that states its convention, got {function!r}. "
            "Decorate your own with `bayescal.metrics.stated(convention)`."
        )
    facts, events = _FACTS[function], events or top_label()
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "weights"}
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise TypeError(
            f"`settings` of {function.__name__} must be among {', '.join(known) or 'none'}, got {', '.join(unknown)}. "
            "Check the spelling."
        )

    def compute(probability, outcome, weights):
        return function(probability, outcome, weights=weights, **settings)

    def interval(probability, outcome, weights):
        assert facts.interval is not None
        return facts.interval(probability, outcome, weights=weights, **settings)

    words = [events.name, facts.convention, *(f"{name} = {value}" for name, value in (known | settings).items())]
    return WholeMetric(
        events.read,
        compute,
        interval if facts.interval else None,
        "; ".join(word for word in words if word),
        facts.better,
        facts.regular,
        facts.order_statistic,
    )
