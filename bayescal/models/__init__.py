"""Networks as `Model`: adapters for flax, and a few networks to start with."""

from bayescal.models.adapters import from_linen, from_nnx
from bayescal.models.concrete_dropout import concrete_dropout
from bayescal.models.convnet import convnet
from bayescal.models.drop_connect import drop_connect
from bayescal.models.dropout import dropout_layer
from bayescal.models.lenet import lenet
from bayescal.models.mlp import mlp
from bayescal.models.prior import with_prior
from bayescal.models.rank_one import rank_one_conv, rank_one_dense
from bayescal.models.variational import (
    flipout,
    local_reparametrisation,
    shared_noise,
    variational_conv,
    variational_dense,
)

__all__ = [
    "concrete_dropout",
    "convnet",
    "drop_connect",
    "dropout_layer",
    "flipout",
    "from_linen",
    "from_nnx",
    "lenet",
    "local_reparametrisation",
    "mlp",
    "rank_one_conv",
    "rank_one_dense",
    "shared_noise",
    "variational_conv",
    "variational_dense",
    "with_prior",
]
