"""Networks as `Model`: adapters for flax, and a few networks to start with."""

from bayescal.models.adapters import from_linen, from_nnx
from bayescal.models.convnet import convnet
from bayescal.models.dropout import dropout_layer
from bayescal.models.lenet import lenet
from bayescal.models.mlp import mlp
from bayescal.models.prior import with_prior
from bayescal.models.variational import variational_conv, variational_dense

__all__ = [
    "convnet",
    "dropout_layer",
    "from_linen",
    "from_nnx",
    "lenet",
    "mlp",
    "variational_conv",
    "variational_dense",
    "with_prior",
]
