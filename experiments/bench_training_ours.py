"""Our side of the training benchmark: the same networks as methods of bayescal, and a whole training as one call."""

from collections.abc import Callable
from functools import cache
from itertools import count

import jax
import numpy as np
import optax
from bench_training_data import CLASSES, LEARNING_RATE, Case, rows_of

import bayescal as bc


def training(case: Case) -> Callable[[], bc.Fit]:
    """`bc.fit` from scratch, each call with another key, as a script would write it."""
    method = bc.ensemble(bc.map_estimate(model(case), likelihood(case), optax.adam(LEARNING_RATE)), case.members)
    data, numbers = [bc.Dataset(*rows) for rows in rows_of(case)], count()
    if case.experiments is None:
        data = data[0]
    else:
        method = bc.experiments(method, case.experiments)
    schedule = {"epochs": case.epochs, "batch_size": case.batch_size, "progress": False}
    return lambda: bc.fit(method, data, jax.random.key(next(numbers)), **schedule)


def last_loss(fitted: bc.Fit) -> float:
    """Mean of the last epoch over all networks."""
    return float(np.mean(fitted.history["loss"][-1]))


def likelihood(case: Case) -> Callable:
    return bc.heteroscedastic if case.network == "regression" else bc.Categorical


def model(case: Case) -> bc.Model:
    networks = {
        "regression": lambda: bc.models.mlp(8, (50,), 2),
        "mlp": lambda: bc.models.mlp(784, (case.width, case.width), CLASSES),
        "lenet": lambda: bc.models.lenet((28, 28, 1), CLASSES, channels=(16, 16)),
        "baseline": lambda: bc.from_nnx(lambda rngs: _modules()["baseline"](rngs)),
        "block": lambda: bc.from_nnx(lambda rngs: _modules()["block"](rngs)),
    }
    return networks[case.network]()


@cache
def _modules() -> dict[str, type]:
    """The networks that bayescal lacks; a function, since flax is heavy to import."""
    from flax import nnx

    from bayescal.models.convnet import max_pool

    class Baseline(nnx.Module):
        """LeNet of uncertainty-baselines: three 5 x 5 convolutions that keep the size, two poolings, dense 84, head."""

        def __init__(self, rngs):
            self.first = nnx.Conv(1, 6, (5, 5), rngs=rngs)
            self.second = nnx.Conv(6, 16, (5, 5), rngs=rngs)
            self.third = nnx.Conv(16, 120, (5, 5), rngs=rngs)
            self.dense = nnx.Linear(5880, 84, rngs=rngs)
            self.head = nnx.Linear(84, CLASSES, rngs=rngs)

        def __call__(self, inputs):
            x = nnx.relu(max_pool(self.first(inputs)))  # pooled first: the same, on fewer pixels
            x = nnx.relu(self.third(nnx.relu(max_pool(self.second(x)))))
            return self.head(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))

    class Block(nnx.Module):
        """A convolution, a residual block of two 3 x 3 convolutions with batch norm, global average pooling, head."""

        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
            self.first = nnx.Conv(16, 32, (3, 3), use_bias=False, rngs=rngs)
            self.second = nnx.Conv(32, 32, (3, 3), use_bias=False, rngs=rngs)
            self.beside = nnx.Conv(16, 32, (1, 1), rngs=rngs)
            self.norms = nnx.List([nnx.BatchNorm(32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs)])
            self.head = nnx.Linear(32, CLASSES, rngs=rngs)

        def __call__(self, inputs):
            x = nnx.relu(self.stem(inputs))
            inner = self.second(nnx.relu(self.norms[0](self.first(x))))
            x = nnx.relu(self.beside(x) + self.norms[1](inner))
            return self.head(x.mean((1, 2)))

    return {"baseline": Baseline, "block": Block}
