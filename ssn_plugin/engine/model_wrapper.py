"""The model inside mmengine's wrappers for distributed training."""

from mmengine.model import is_model_wrapper
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whose module names are those of the config."""
    return model.module if is_model_wrapper(model) else model
