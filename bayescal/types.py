"""The small shapes that everything passes: see the data flow in README."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, dataclass_transform

import jax
import numpy as np
from jaxtyping import Float, Int

Array = jax.Array | np.ndarray
Key = jax.Array
PyTree = Any
State = Any
Outputs = Any


class Variables(NamedTuple):
    """What a network is made of: `params` are inferred; `stats` are carried along and never differentiated."""

    params: PyTree
    stats: PyTree = ()


class OneNetwork(NamedTuple):
    """A faster way on CPU to put many rows through the network of one key.

    outputs: `(variables, inputs, key) -> outputs`, what `apply` gives each row alone with that key, up to rounding.
    apply: the `Model.apply` that it stands for, so that it does not for one put in its place.
    least_rows: with fewer it is not the faster.
    """

    outputs: Callable[[Variables, Any, Key], Outputs]
    apply: Callable[[Variables, Any, Key | None], Outputs]
    least_rows: int = 1


class Model(NamedTuple):
    """A network as pure functions. A key makes a forward pass stochastic; `key=None` makes it deterministic.

    init: `key -> Variables`.
    apply: `(variables, inputs, key | None) -> outputs`, a pytree with the batch axis first. Never touches `stats`
        (batch norm uses its running moments). A key given to a network without a random stream is an error.
    train: `(variables, inputs, key) -> (outputs, new_stats, penalty)`: the pass that is differentiated.
        `penalty` is in nats for the whole data set (KL of variational layers, learnt dropout rates), else 0.
    features, head: `(variables, inputs, key | None) -> (batch, features)`, what the last layer is given, and
        `(variables, features) -> outputs`, that layer: apply(v, x, key) = head(v, features(v, x, key)), to the bit within
        one program. For last-layer methods and feature scores; None where there are none.
    head_path: keys that lead to the head's parameters in `params`; () where there is no head.
    taps: `(variables, inputs, zeros | None) -> (outputs, seen)`, the deterministic pass with `zeros` added to what each
        dense layer and convolution puts out, (batch, positions, channels) by the layer's name, and what each had `seen`,
        (batch, positions, rows of its kernel as a matrix): all that KFAC needs. None where absent.
    one_network: a faster way on CPU to put many rows through the network of one key; None where there is none.
    """

    init: Callable[[Key], Variables]
    apply: Callable[[Variables, Any, Key | None], Outputs]
    train: Callable[[Variables, Any, Key], tuple[Outputs, PyTree, Any]]
    features: Callable[[Variables, Any, Key | None], jax.Array] | None = None
    head: Callable[[Variables, Any], Outputs] | None = None
    head_path: tuple[str, ...] = ()
    taps: Callable[[Variables, Any, dict[str, Any] | None], tuple[Outputs, dict[str, jax.Array]]] | None = None
    one_network: OneNetwork | None = None


class Dataset(NamedTuple):
    """Rows held in memory: `inputs` (rows, ...), `targets` (rows, ...), `weights` (rows,) or None for ones."""

    inputs: Any
    targets: Any
    weights: Any = None


class Batch(NamedTuple):
    """Rows that `update` sees; a loss is sum(weights * loss) / rows of the batch, padding counted among them.

    weights: the row's weight relative to the data set's mean, times rows of the batch / rows that are not padding; 0
        for padding. All ones for a full batch of rows that weigh the same.
    index: the row's place in the data set.
    rows: how many are not padding; None = all. What sums over the data, and does not average over batches, weighs rows by
        `batch.relative_weights()`, whose sum over an epoch is the number of rows of the data.
    """

    inputs: Any
    targets: Any
    weights: Float[Array, "batch"]
    index: Int[Array, "batch"]
    rows: Any = None

    def relative_weights(self) -> Float[Array, "batch"]:
        """The row's weight relative to the data set's mean, whatever the padding beside it; 0 for padding."""
        return self.weights if self.rows is None else self.weights * (self.rows / self.weights.shape[0])


class Members(NamedTuple):
    """Independent members that `fit` runs apart, each as one scan over its own batches.

    build: one member's settings -> its method; called inside the member loop, must be hashable.
    settings: pytree of arrays with a leading member axis, or () where members differ by their key alone.
    number: how many members.
    resample: `(key, rows) -> (rows,)` weights that each member draws for the rows of its data; None = all rows alike.
    """

    build: Callable[[PyTree], "Method"]
    settings: PyTree
    number: int
    resample: Callable[[Key, int], jax.Array] | None = None


class Method(NamedTuple):
    """A way to infer networks from data: build it once, then init -> update -> predict.

    init: `(key, start) -> state`; `start` is None, `Variables`, or the state of the method before it.
    update: `(state, batch, key) -> (state, info)`; `info` is a dict of scalars, `loss` (nats per example) among them.
    predict: `(state, inputs, key | None) -> Predictive`; the same key is the same network for any inputs.
    members: set by `ensemble`; None for a method that is trained whole. Replace verbs before ensembling: `fit` runs the
        members' own.
    experiments: set by `experiments`: independent repetitions (splits, grid points), never pooled; else None.
    draw: `(state, key | None) -> Variables`, one network from the posterior, or, for None, the central network where the
        method has one; None for a method that has none to draw from.
    end_epoch: `state -> state`, what is done once after each pass over the data (Laplace decomposes what it summed up);
        `fit` calls it, and so must a loop of your own. None = nothing.
    evidence: `state -> log marginal likelihood` of the training data, nats; None for a method that has none.
    """

    init: Callable[[Key, PyTree | None], State]
    update: Callable[[State, Batch, Key], tuple[State, dict[str, jax.Array]]]
    predict: Callable[[State, Any, Key | None], Any]
    members: Members | None = None
    experiments: Members | None = None
    draw: Callable[[State, Any], Variables] | None = None
    end_epoch: Callable[[State], State] | None = None
    evidence: Callable[[State], jax.Array] | None = None


class EnsembleState(NamedTuple):
    """State of every method that has `members`: states stacked on a leading member axis, and which still count."""

    members: State
    alive: jax.Array  # bool (member,); False = diverged, weight 0 in the pool


class MemberReport(NamedTuple):
    """How each member fared: numpy arrays of shape (member,), or (experiment, member).

    A member that diverged is frozen at once and weighs nothing in predictions; one that stopped early counts.
    """

    alive: np.ndarray  # bool
    reason: np.ndarray  # words, why training ended; see `REASONS`
    stopped_epoch: np.ndarray  # epoch in which it stopped; the number of epochs run where it trained to the end
    stopped_step: np.ndarray  # updates made
    last_finite_loss: np.ndarray  # of one batch, nats per example; NaN where the first update already had none
    best_epoch: np.ndarray  # of the best validation score; -1 without one

    def sentences(self) -> list[str]:
        """A sentence for each member that did not train to the end."""
        told = []
        for place in np.argwhere(self.reason != REASONS[0]):
            at = tuple(int(i) for i in place)
            name = " ".join(f"{word} {i}" for word, i in zip(("experiment", "member")[-len(at) :], at, strict=True))
            end = "stopped early" if self.alive[at] else "diverged and weighs nothing in `state`"
            kept = "" if self.best_epoch[at] < 0 else f"; its best is of epoch {self.best_epoch[at]}"
            told.append(
                f"{name} {end}: {self.reason[at]} in epoch {self.stopped_epoch[at]}, after {self.stopped_step[at]} "
                f"updates (last finite loss {self.last_finite_loss[at]:.3g}){kept}"
            )
        return told


REASONS = (  # a member's status while it trains is its place in this list; the first two are alive
    "trained",
    "no better validation score",
    "loss not finite",
    "state not finite",
    "loss above 1000 x its first",
    "not alive at the start",
)


class Fit(NamedTuple):
    """What training leaves: the last `state`, the `best` one (by validation score, else the last), and the record.

    history: dict name -> array (epoch, member), or (epoch, experiment, member): float means over the epoch, NaN where
        a member did not train, and the bool `alive`. One member for a method without members.
    seconds: wall clock of this call: `first_epoch` (with compilation), `later_epochs`, and `epochs` that it ran.
    """

    state: State
    best: State
    history: dict[str, np.ndarray]
    members: MemberReport
    seconds: dict[str, float]


class Estimate(NamedTuple):
    """A figure with what is needed to read it: interval, number of rows or repetitions, and the convention used."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    convention: str = ""

    def json(self) -> dict[str, Any]:
        """The one form of a number in our json files: `value`, and `low`, `high`, `n`, `convention` where known."""
        return {k: v for k, v in self._asdict().items() if v is not None and v != ""}


class Metric(NamedTuple):
    """A streaming metric: `measure` gives a pytree of sums, so merging is always leaf-wise addition.

    measure: `(predictive, targets, weights) -> sums`, for at most 2**20 rows a call (float32 counts stop at 2**24).
        Linear in the weights (sums of squared weights apart): bootstrap and influence rest on it.
    compute: `sums -> value`; takes jax arrays (jit) as well as numpy float64 totals.
    interval: `sums -> (low, high)` at 95 %, where one is known in closed form; else that of the rows' influence.
    convention: what differs in the field (scale, bins, norm, closure), in words.
    better: "lower", "higher" or "neither".
    regular: whether its estimate is close to normal, so that bootstrap and influence give intervals. False for the norm
        of gaps that may be zero (ECE and its kin): there both fail, and only its own `interval` is used.
    """

    measure: Callable[[Any, Any, Any], PyTree]
    compute: Callable[[PyTree], Any]
    interval: Callable[[PyTree], tuple[Any, Any]] | None = None
    convention: str = ""
    better: str = "lower"
    regular: bool = True


class WholeMetric(NamedTuple):
    """A metric that is no sum (ranks, adaptive bins, kernels): a plain function of whole columns.

    read: `(predictive, targets) -> tuple of arrays (rows, ...)`, row by row; metrics with the same `read` share it.
    compute: `(*columns, weights | None) -> value`, jittable, differentiable in the weights; rows of weight 0 count for
        nothing, None = all rows alike.
    interval: `(*columns, weights | None) -> (low, high)` at 95 % on the host; else that of the rows' influence.
    convention, better, regular: as in `Metric`.
    order_statistic: an irregular metric for which the bootstrap is sound, though influence is not (FPR at 95 % TPR).
    """

    read: Callable[[Any, Any], tuple[Any, ...]]
    compute: Callable[..., Any]
    interval: Callable[..., tuple[Any, Any]] | None = None
    convention: str = ""
    better: str = "lower"
    regular: bool = True
    order_statistic: bool = False


@dataclass_transform(frozen_default=True)
def pytree(cls):
    """Frozen dataclass whose fields are pytree leaves; fields marked `metadata={"static": True}` are structure.

    Rebuilding goes around `__init__`, so `__post_init__` may check shapes: it runs for arrays that a person passes and
    never for the placeholders that jax puts into a tree.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    static = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]
    names = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]

    def flatten(value):
        return [getattr(value, n) for n in names], tuple(getattr(value, n) for n in static)

    def flatten_with_keys(value):
        leaves, aux = flatten(value)
        return [(jax.tree_util.GetAttrKey(n), leaf) for n, leaf in zip(names, leaves, strict=True)], aux

    def unflatten(aux, leaves):
        value = object.__new__(cls)
        for name, leaf in zip([*names, *static], [*leaves, *aux], strict=True):
            object.__setattr__(value, name, leaf)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
