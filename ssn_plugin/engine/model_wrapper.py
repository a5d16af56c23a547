"""What is inside mmengine's wrappers: of models for distributed training, and of optimizers."""

from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whose module names are those of the config."""
    return model.module if is_model_wrapper(model) else model


def optim_wrappers(wrapper: OptimWrapper | OptimWrapperDict) -> list[OptimWrapper]:
    """The wrappers of single optimizers, of which GANs for one have several."""
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
