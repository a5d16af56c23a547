"""What the host knows of frozen layers, and the writing back of their control parameters.

The gradient of frozen control parameters is zero, but an optimizer with momentum or weight decay
still moves a parameter of zero gradient, and one without gradient would be an unused parameter to
DistributedDataParallel. So after every optimizer step of the process the frozen ones are written
back.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ssn_plugin.torch_versions import is_compiling


class _Held(NamedTuple):
    """Frozen choices of a layer by 'mean' and 'var', and their one-hot vectors.

    ``flags`` are the buffers that said so, each with its version then: whoever writes to them
    changes it. None for tensors made in inference mode, which count no writes.
    """

    choices: dict[str, int]
    vectors: dict[str, Tensor]
    flags: list[tuple[Tensor, int | None]]


_held: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()
_hook_handles: list = []


def _flags(layer: nn.Module, names) -> list[Tensor]:
    return [getattr(layer, f'{name}_{kind}') for name in names for kind in ('fixed', 'choice')]


def held_choices(layer: nn.Module) -> dict[str, int]:
    """Indices of the candidates at which control parameters of a layer are held.

    Args:
        layer: An SSN.
    """
    return _held[layer].choices if layer in _held else {}


def known_choices(layer: nn.Module) -> tuple[int | None, int | None]:
    """Indices of the frozen candidates of mean and variance, without reading a tensor.

    None where the layer is not frozen, or where its buffers were written to since: by
    ``copy_selection``, an averaging of models, a broadcast. The next ``set_radius`` knows again.
    None, too, where they were made in inference mode, which notices no writes. Writing through
    ``.data`` goes unnoticed.

    Args:
        layer: An SSN.
    """
    if is_compiling() or layer not in _held:
        return None, None
    choices, _, flags = _held[layer]
    found = _flags(layer, choices)
    for tensor, (seen, version) in zip(found, flags, strict=True):
        if tensor is not seen or version is None or tensor._version != version:
            return None, None
    return choices.get('mean'), choices.get('var')


@torch.no_grad()
def hold(layer: nn.Module, choices: dict[str, int]) -> None:
    """Hold control parameters of a layer from now on, and no others of it.

    Args:
        layer: An SSN whose buffers say the same.
        choices: 'mean' and 'var' -> index of the frozen candidate; empty lets go.
    """
    if not choices:
        _held.pop(layer, None)
        return
    vectors = {}
    for name, choice in choices.items():
        control = getattr(layer, f'{name}_weight')
        candidates = torch.arange(len(control), device=control.device)
        vectors[name] = (candidates == choice).to(control.dtype)
    flags = [
        (tensor, None if tensor.is_inference() else tensor._version)
        for tensor in _flags(layer, choices)
    ]
    _held[layer] = _Held(choices, vectors, flags)
    if not _hook_handles:
        _hook_handles.append(register_optimizer_step_post_hook(_write_back))


@torch.no_grad()
def _write_back(*_) -> None:
    pairs = [
        (getattr(layer, f'{name}_weight'), vector)
        for layer, held in _held.items()
        for name, vector in held.vectors.items()
    ]
    if pairs:
        parameters, vectors = zip(*pairs, strict=True)
        torch._foreach_copy_(list(parameters), list(vectors))
