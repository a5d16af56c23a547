"""Holds frozen control parameters in place against the momentum and weight decay of optimizers.

Their gradient is zero, but an optimizer with momentum or weight decay still moves a parameter of
zero gradient, and one without gradient would be an unused parameter to DistributedDataParallel. So
after every optimizer step of the process the frozen ones are written back.
"""

from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# Layer -> the statistics ('mean', 'var') whose control parameters are frozen.
_frozen: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()
_hook_handles: list = []


def hold(layer: nn.Module, statistics: tuple[str, ...]) -> None:
    """Hold the control parameters of these statistics from now on, and no others of the layer.

    Args:
        layer: An SSN.
        statistics: Out of 'mean', 'var'; empty lets go.
    """
    if not statistics:
        _frozen.pop(layer, None)
        return
    _frozen[layer] = statistics
    if not _hook_handles:
        _hook_handles.append(register_optimizer_step_post_hook(_write_back))


@torch.no_grad()
def _write_back(*_) -> None:
    pairs = [
        (getattr(layer, f'{name}_weight'), getattr(layer, f'{name}_choice'))
        for layer, statistics in _frozen.items()
        for name in statistics
    ]
    if pairs:
        parameters, choices = zip(*pairs, strict=True)
        torch._foreach_copy_(list(parameters), list(choices))
