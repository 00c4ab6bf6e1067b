"""Callbacks for `pytorch_lightning`. What they do is in gradrep_kernels.integrations.callbacks."""

from pytorch_lightning import Callback

from gradrep_kernels.integrations import callbacks

__all__ = ["ClipGradNorm", "SpatialGradientScalingCallback", "ValidateAverages"]


class SpatialGradientScalingCallback(callbacks.SpatialGradientScalingCallback, Callback):
    __doc__ = callbacks.SpatialGradientScalingCallback.__doc__


class ClipGradNorm(callbacks.ClipGradNorm, Callback):
    __doc__ = callbacks.ClipGradNorm.__doc__


class ValidateAverages(callbacks.ValidateAverages, Callback):
    __doc__ = callbacks.ValidateAverages.__doc__
