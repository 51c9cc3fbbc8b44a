"""Multilayer perceptron."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

from bayescal.models.adapters import from_nnx
from bayescal.models.dropout import Rate, check_dropout, dropout_layer, has_dropout
from bayescal.types import Model


def mlp(
    in_features: int,
    hidden: Sequence[int],
    out_features: int,
    *,
    dropout: Rate = 0.0,
    batch_norm: bool = False,
) -> Model:
    """Dense layers with ReLU between them: (batch, ...) flattened to (batch, in_features) -> (batch, out_features).

    Its features are what the last dense layer is given: (batch, hidden[-1]), or the inputs where nothing is hidden.

    Args:
        in_features: numbers per example, after flattening.
        hidden: width of each hidden layer.
        out_features: classes, or numbers per example.
        dropout: rate after every hidden layer, in [0, 1); may be traced, see `dropout_layer`.
        batch_norm: normalise before every ReLU.

    Raises:
        ValueError: for a dropout rate outside [0, 1).
    """
    check_dropout(dropout)
    build = lambda rngs: _module()(in_features, hidden, out_features, dropout, batch_norm, rngs)
    return from_nnx(build, head="head")


@cache  # jax keeps every module class for ever: one, and none that closes over a traced rate
def _module():
    from flax import nnx

    class MLP(nnx.Module):
        def __init__(self, in_features, hidden, out_features, dropout, batch_norm, rngs):
            widths = [in_features, *hidden]
            self.dense = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(widths)])
            self.norm = nnx.List([nnx.BatchNorm(b, rngs=rngs) for b in hidden] if batch_norm else [])
            self.dropout = nnx.List([dropout_layer(dropout, rngs) for _ in hidden] if has_dropout(dropout) else [])
            self.head = nnx.Linear(widths[-1], out_features, rngs=rngs)

        def __call__(self, inputs):
            x = inputs.reshape(inputs.shape[0], -1)
            for i, dense in enumerate(self.dense):
                x = dense(x)
                x = nnx.relu(self.norm[i](x) if self.norm else x)
                x = self.dropout[i](x) if self.dropout else x
            return self.head(x)

    return MLP
