"""Holds frozen control parameters in place against the momentum and weight decay of optimizers.

Their gradient is zero, but an optimizer with momentum or weight decay still moves a parameter of
zero gradient, and one without gradient would be an unused parameter to DistributedDataParallel. So
after every optimizer step of the process the frozen ones are written back.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# Layer -> 'mean', 'var' -> the one-hot vector of frozen control parameters.
_held: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
_hook_handles: list = []


def held(layer: nn.Module) -> dict[str, Tensor]:
    """The one-hot vectors at which control parameters of a layer are held.

    Args:
        layer: An SSN.
    """
    return _held.get(layer, {})


def hold(layer: nn.Module, vectors: dict[str, Tensor]) -> None:
    """Hold control parameters of a layer from now on, and no others of it.

    Args:
        layer: An SSN.
        vectors: 'mean' and 'var' -> one-hot vector, shape (K,); empty lets go.
    """
    if not vectors:
        _held.pop(layer, None)
        return
    _held[layer] = vectors
    if not _hook_handles:
        _hook_handles.append(register_optimizer_step_post_hook(_write_back))


@torch.no_grad()
def _write_back(*_) -> None:
    pairs = [
        (getattr(layer, f'{name}_weight'), vector)
        for layer, vectors in _held.items()
        for name, vector in vectors.items()
    ]
    if pairs:
        parameters, vectors = zip(*pairs, strict=True)
        torch._foreach_copy_(list(parameters), list(vectors))
