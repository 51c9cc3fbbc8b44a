"""Training and prediction: data on the device, members apart, one scan over the steps of an epoch."""

from bayescal.train.features import predict_features
from bayescal.train.fit import fit
from bayescal.train.predict import predict

__all__ = ["fit", "predict", "predict_features"]
