"""How far features leave the subspace in which the training rows vary most: residual, and virtual-logit matching."""

from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.scores.covariance import FLOAT32, scatter
from bayescal.scores.features import as_rows, blocks, class_means, defined, from_centre, halves, training_rows
from bayescal.scores.heads import Head, affine, as_pytree, energy, logits_of
from bayescal.types import Array, pytree


@pytree
class Residual:
    """Length of the part of f - origin outside the principal subspace: `fitted(features) -> (rows,)`.

    Args:
        origin: where the subspace starts, in two parts that add up to it.
        complement: orthonormal directions of least variance about the origin.
    """

    origin: Float[Array, "2 features"]
    complement: Float[Array, "features directions"]

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """The unit of the features, >= 0; higher = more unlike the training data. NaN for rows that are not finite."""
        return _residual(self, as_rows(features, self.complement.shape[0]))


@pytree
class ViM:
    """alpha * residual - logsumexp(logits): `fitted(features) -> (rows,)`.

    Args:
        residual: the fitted residual.
        head: gives the logits.
        alpha: mean largest logit / mean residual of the training rows.
    """

    residual: Residual
    head: Head
    alpha: Float[Array, ""]

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """Nats, of any sign; higher = more unlike the training data. NaN where features or logits are not finite."""
        return _virtual(self, as_rows(features, self.residual.complement.shape[0]))


def fit_residual(
    features: Float[Array, "rows features"], *, dim: int, origin: Float[Array, "features"] | None = None
) -> Residual:
    """|(I - P)(f - u)|, P the projection on the `dim` directions of largest mean square of the training rows about u.

    The unit of the features, >= 0; higher = more unlike the training data. Unchanged by rotations about u. Blind to rows
    that stay in the subspace, however far out. Fitted in float64 on the host, a few rows at a time; rounded in float32 by
    about 1e-7 |f - u|, below which it says nothing.

    Args:
        features: penultimate activations of the training rows.
        dim: directions of the principal subspace, fewer than features.
        origin: u; None = the rows' mean. That of ViM's own residual is `head_origin(head, features)`.

    Raises:
        ValueError: for a dim outside [1, features), an origin of another shape or not finite, features that are not
            finite, other shapes.
    Source: Wang et al. 2022 (recalled), whose ablation it is.
    """
    rows = training_rows(features)
    width = rows.shape[1]
    if not isinstance(dim, Integral) or not 1 <= dim < width:
        raise ValueError(
            f"`dim` must be a whole number from 1 to {width - 1}, one less than the features, got {dim!r}. Half of them is "
            "usual."
        )
    everything = np.zeros(len(rows), np.int8), np.array([len(rows)])
    start = class_means(rows, *everything)[0] if origin is None else np.asarray(origin, np.float64)
    if start.shape != (width,) or not np.isfinite(start).all():
        raise ValueError(
            f"`origin` must be finite and of shape ({width},) like a row of `features`, got shape {start.shape}. Leave it out."
        )
    vectors = np.linalg.eigh(scatter((block, start) for _, block in blocks(rows))[0])[1]  # least first
    return Residual(halves(start), jnp.asarray(vectors[:, : width - int(dim)], jnp.float32))


def head_origin(head: Head, features: Float[Array, "rows features"]) -> np.ndarray:
    """u = -pinv(W) b of a head f W + b, (features,): the shortest features whose logits are nearest to zero.

    Args:
        head: affine, `features -> logits`; its weights are read off its derivative.
        features: rows on which it is checked to be affine.

    Raises:
        ValueError: for a head that is not affine.
    Source: Wang et al. 2022 (recalled).
    """
    weights, bias = affine(as_pytree(head), training_rows(features, least=1))
    return -bias @ np.linalg.pinv(weights, rcond=max(weights.shape) * FLOAT32)


def fit_vim(
    features: Float[Array, "rows features"], head: Head, *, dim: int, origin: Float[Array, "features"] | None = None
) -> ViM:
    """alpha * |(I - P)(f - u)| - logsumexp(head(f)), alpha = mean largest logit / mean residual of the training rows.

    Nats, of any sign; higher = more unlike the training data. The residual, at the scale of the logits, is one more logit
    for "none of them". Unlike free energy alone it depends on a shift of all logits, through alpha.

    Args:
        features: penultimate activations of the training rows.
        head: `features (rows, features) -> logits (rows, classes)`, best `jax.tree_util.Partial(model_head, variables)`, as
            members need it; another plain function is another program.
        dim: directions of the principal subspace; half the features is usual, fewer where they are many.
        origin: u; None = `head_origin(head, features)`, for affine heads.

    Raises:
        TypeError: for a head that is no function.
        ValueError: where the mean largest logit is not positive, the residuals are zero, the logits not finite, the head
            not affine; and as in `fit_residual`.
    Source: Wang et al. 2022 (recalled); alpha and origin as in OpenOOD's `vim_postprocessor.py`, which was looked at.
    """
    head = as_pytree(head)
    rows = training_rows(features)
    residual = fit_residual(rows, dim=dim, origin=head_origin(head, rows) if origin is None else origin)
    start, sums = np.asarray(residual.origin, np.float64).sum(0), np.zeros(3)
    for _, block in blocks(rows):
        float32 = jnp.asarray(block, jnp.float32)
        largest, outside = logits_of(head, float32).max(-1), residual(float32)
        length = np.linalg.norm(block - start, axis=1)
        sums += [np.asarray(x, np.float64).sum() for x in (largest, outside, length)]
    logit, mean, length = sums / len(rows)
    if not 0 < logit < np.inf:
        raise ValueError(
            f"`head` must give a positive and finite mean of the largest logits of the training rows, got {logit:.3g}: alpha "
            "would turn the score round. Add the same number to all logits."
        )
    if not mean > FLOAT32 * residual.complement.shape[1] ** 0.5 * length:
        raise ValueError(
            f"`dim` must leave a residual of the training rows, got {dim} of {rows.shape[1]}, which hold them all: alpha "
            "would be infinite. Pass a smaller one."
        )
    return ViM(residual, head, jnp.float32(logit / mean))


@jax.jit
def _residual(fitted, features):
    outside = jnp.matmul(from_centre(features, fitted.origin), fitted.complement, precision="highest")
    return defined(features, jnp.linalg.norm(outside, axis=-1))


@jax.jit
def _virtual(fitted, features):
    return defined(
        features, fitted.alpha * _residual(fitted.residual, features) + energy(logits_of(fitted.head, features))
    )
