"""From control parameters to importance ratios: as numbers where reading is free, else as tensors.

Reading a tensor on a GPU waits for everything that runs there. So a layer on a GPU, or one that is
being compiled or traced, works with tensors; a layer on the CPU works with numbers, leaves out what
does not take part, and spares some forty operators on tensors of three elements.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ssn_plugin.ops.sparsestmax import SparsestMaxFunction, project_floats
from ssn_plugin.torch_versions import is_compiling

# The choice of an undecided statistic. Also that of a decided one whose flag was copied without its
# choice, as in a model that took over parameters and persistent buffers: then the largest control
# parameter is the choice.
UNKNOWN = -1

Choices = tuple[int | None, int | None]  # indices of the selected mean and variance


class Selection(NamedTuple):
    """What SparsestMax needs beside the control parameters; all tensors are 0-d."""

    radius: Tensor
    mean_fixed: Tensor  # above 0 the mean is decided
    var_fixed: Tensor
    mean_choice: Tensor  # index of the selected candidate, or UNKNOWN
    var_choice: Tensor


class Control(NamedTuple):
    """Where the importance ratios of a layer come from.

    Attributes:
        mean: Control parameters of the means, shape (K,), or the ratios themselves. None where
            ``known`` holds both choices.
        var: The same of the variances.
        ratio_map: 'sparsestmax', 'softmax', or 'given' for ratios.
        selection: What SparsestMax needs; None for the other maps.
        known: The choices that can be told without reading a tensor. Results are the same without
            it; it spares work on GPUs and in compiled graphs.
    """

    mean: Tensor | None
    var: Tensor | None
    ratio_map: str
    selection: Selection | None = None
    known: Choices = (None, None)


def largest(control: Tensor) -> Tensor:
    """Index of the largest entry of (..., K), the last one among equals, keeping the dimension."""
    return control.shape[-1] - 1 - control.flip(-1).argmax(-1, keepdim=True)


def selected_ratios(
    mean_control: Tensor, var_control: Tensor, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Which of (mean, variance) are decided, (2, 1), and their one-hot vectors, (2, K)."""
    fixed = torch.stack((selection.mean_fixed, selection.var_fixed)).unsqueeze(-1) > 0
    choice = torch.stack((selection.mean_choice, selection.var_choice)).unsqueeze(-1)
    control = torch.stack((mean_control, var_control)).detach()
    choice = torch.where(choice == UNKNOWN, largest(control), choice)
    candidates = torch.arange(control.shape[-1], device=choice.device)
    return fixed, (candidates == choice).to(control.dtype)


def ratio_tensors(control: Control) -> tuple[Tensor, Tensor]:
    """Importance ratios as tensors, with gradient; no value is read."""
    if control.ratio_map == 'given':
        return control.mean, control.var
    both = torch.stack((control.mean, control.var))
    if control.selection is None:
        # In float32 at least: before torch 2.2 the CPU has none in float16.
        wide = both.to(torch.promote_types(both.dtype, torch.float32))
        return wide.softmax(-1).to(both.dtype).unbind()
    fixed, one_hot = selected_ratios(control.mean, control.var, control.selection)
    ratios = SparsestMaxFunction.apply(both, control.selection.radius)
    return torch.where(fixed, one_hot, ratios).unbind()


class Ratios(NamedTuple):
    """Importance ratios of one statistic.

    Attributes:
        values: The K ratios: floats or 0-d tensors; None for those of a tensor beside this.
        active: Indices of the candidates that take part, or whose ratio has a gradient.
        moving: Indices of the ratios with a gradient.
        pull_back: From the gradients of the K ratios, of which those that do not move are not read,
            to those of the control parameters.
        decided: Whether no later radius changes them.
        on_simplex: Whether they sum to one whatever they come from, so that their gradients matter
            up to a common number.
        again: From the control parameters to the same ratios as a tensor, for who differentiates
            twice.
    """

    values: Sequence[float | Tensor] | None
    active: Sequence[int]
    moving: Sequence[int]
    pull_back: Callable[[list[float]], list[float]] | None = None
    decided: bool = False
    on_simplex: bool = True
    again: Callable[[Tensor], Tensor] | None = None

    def filled(self, ratios: Tensor | None, x: Tensor) -> 'Ratios':
        """With the values of a tensor (K,) where there are none, in the dtype of x's statistics."""
        if self.values is not None:
            return self
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self._replace(values=ratios.to(dtype).unbind())


def unread_ratios(ratios: Tensor, on_simplex: bool) -> Ratios:
    """Ratios in a tensor whose values are not read: all of them take part."""
    candidates = list(range(len(ratios)))
    learns = torch.is_grad_enabled() and ratios.requires_grad
    return Ratios(None, candidates, candidates if learns else [], on_simplex=on_simplex)


def decided_ratios(choice: int, size: int) -> Ratios:
    """Ratios of a decided statistic of ``size`` candidates."""
    values = [0.0] * size
    values[choice] = 1.0
    return Ratios(values, [choice], [], decided=True)


def control_gradient(
    ratios: Ratios, gradients: dict[int, float | Tensor], size: int, factory: dict
) -> Tensor:
    """Gradient of control parameters, or of the ratios themselves where those are given.

    ``factory`` holds their dtype and device.
    """
    if not ratios.moving:
        return torch.zeros(size, **factory)
    if ratios.pull_back is None:
        return torch.stack([gradients[k] for k in range(size)]).to(**factory)
    return torch.tensor(ratios.pull_back([gradients.get(k, 0.0) for k in range(size)]), **factory)


def has_values(*tensors: Tensor) -> bool:
    """Whether these tensors hold values that can be read: nothing is recorded, nothing is faked."""
    if is_compiling() or torch.jit.is_tracing():
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    for tensor in tensors:  # a loop, which is the fastest: every forward pass comes here
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            return False
    return True


def readable(*tensors: Tensor) -> bool:
    """Whether reading their values costs nothing: they are in the memory of the CPU."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return False
    return has_values(*tensors)


def read_ratios(control: Control, size: int) -> list[Ratios | None]:
    """Importance ratios of means and variances, None where reading them would wait."""
    if control.mean is None or not readable(control.mean, control.var, *(control.selection or ())):
        return [None if k is None else decided_ratios(k, size) for k in control.known]
    tracks = torch.is_grad_enabled()
    both = (control.mean, control.var)
    if control.selection is None:
        read = _read_softmax if control.ratio_map == 'softmax' else _read_given
        return [read(z.tolist(), tracks and z.requires_grad) for z in both]
    radius, *flags = control.selection
    return [
        _read_sparsestmax(z, radius.item(), fixed, choice, tracks and z.requires_grad)
        for z, fixed, choice in zip(both, flags[:2], flags[2:], strict=True)
    ]


def _read_given(values: list[float], learns: bool) -> Ratios:
    active = [k for k, value in enumerate(values) if learns or value != 0]
    moving = active if learns else []
    return Ratios(values, active, moving, list, on_simplex=False, again=_unchanged)


def _unchanged(ratios: Tensor) -> Tensor:
    return ratios


def _read_softmax(z: list[float], learns: bool) -> Ratios:
    values = _softmax(z)
    active = list(range(len(z)))
    pull_back = partial(_softmax_pull_back, values)
    again = partial(torch.softmax, dim=-1)
    return Ratios(values, active, active if learns else [], pull_back, again=again)


def _read_sparsestmax(
    control: Tensor, radius: float, fixed: Tensor, choice: Tensor, learns: bool
) -> Ratios:
    if fixed.item() > 0:
        index = choice.item()
        return decided_ratios(int(largest(control)) if index == UNKNOWN else index, len(control))
    found = project_floats(control.tolist(), radius, torch.finfo(control.dtype).eps)
    moving = found.moving if learns else []
    active = moving
    if len(moving) < len(found.ratios):
        active = [k for k, value in enumerate(found.ratios) if value != 0 or k in moving]
    again = partial(_sparsestmax_again, radius)
    return Ratios(found.ratios, active, moving, found.pull_back, again=again)


def _sparsestmax_again(radius: float, control: Tensor) -> Tensor:
    return SparsestMaxFunction.apply(control, control.new_tensor(radius))


def _softmax(z: list[float]) -> list[float]:
    top = max(z)
    if abs(top) == math.inf or any(map(math.isnan, z)):
        return [math.nan] * len(z)
    powers = [math.exp(value - top) for value in z]
    total = sum(powers)
    return [power / total for power in powers]


def _softmax_pull_back(ratios: list[float], dp: list[float]) -> list[float]:
    mean = sum([p * d for p, d in zip(ratios, dp, strict=True)])
    return [p * (d - mean) for p, d in zip(ratios, dp, strict=True)]
