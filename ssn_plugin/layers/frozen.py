"""Holds frozen control parameters in place against the momentum and weight decay of optimizers.

Their gradient is zero, but an optimizer with momentum or weight decay still moves a parameter of
zero gradient, and one without gradient would be an unused parameter to DistributedDataParallel. So
after every optimizer step of the process the frozen ones are written back.
"""

from weakref import WeakKeyDictionary

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# Layer -> the statistics ('mean', 'var') whose control parameters are frozen.
_held: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
_hook_handles: list = []


def held(layer: nn.Module) -> frozenset[str]:
    """The statistics of a layer whose control parameters are held.

    Args:
        layer: An SSN.
    """
    return _held.get(layer, frozenset())


def hold(layer: nn.Module, statistics: frozenset[str]) -> None:
    """Hold the control parameters of these statistics from now on, and no others of the layer.

    Args:
        layer: An SSN.
        statistics: Out of 'mean', 'var'; empty lets go.
    """
    if not statistics:
        _held.pop(layer, None)
        return
    _held[layer] = statistics
    if not _hook_handles:
        _hook_handles.append(register_optimizer_step_post_hook(_write_back))


def _write_back(*_) -> None:
    for layer in _held:
        layer.restore_fixed()
