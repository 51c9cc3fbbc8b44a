"""Length of the last layer's gradient towards a uniform prediction."""

import jax
from jaxtyping import Float

from bayescal.scores.features import as_rows, defined
from bayescal.scores.heads import Head, as_pytree, logits_of
from bayescal.types import Array, pytree


@pytree
class GradientNorm:
    """Minus the L1 norm of the gradient by the last layer's weights: `score(features) -> (rows,)`.

    Args:
        head: gives the logits, affine in the features.
    """

    head: Head

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """<= 0; higher = more unlike the training data. NaN where features or logits are not finite."""
        return _minus_norm(self, as_rows(features))


def grad_norm(head: Head) -> GradientNorm:
    """-|grad_W KL(uniform || softmax(f W + b))|_1 = -sum_j |f_j| * sum_k |softmax(f W + b)_k - 1 / classes|.

    At most 0; higher = more unlike the training data: the norm itself is large for familiar rows, whose activations are
    large and predictions sure. Nothing is fitted. Unchanged by a shift of all logits. By construction it takes rows far
    out, with large activations, for familiar.

    Args:
        head: `features (rows, features) -> logits (rows, classes)`, affine; best `jax.tree_util.Partial(lambda w, b, f:
            f @ w + b, weights, bias)` with the lambda made once: another plain function is another program.

    Raises:
        TypeError: for a head that is no function.
    Source: Huang et al. 2021 (recalled), temperature 1. OpenOOD's code, which was looked at, gives -classes times this.
    """
    return GradientNorm(as_pytree(head))


@jax.jit
def _minus_norm(score, features):
    logits = logits_of(score.head, features)
    away = abs(jax.nn.softmax(logits) - 1 / logits.shape[-1]).sum(-1)
    return defined(features, -abs(features).sum(-1) * away)
