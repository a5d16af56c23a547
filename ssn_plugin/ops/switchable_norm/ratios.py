"""From control parameters to importance ratios: on the host where it may look, else as tensors."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ssn_plugin.ops.sparsestmax import SparsestMaxFunction
from ssn_plugin.ops.sparsestmax_floats import sparsestmax
from ssn_plugin.torch_versions import is_compiling

# Choice of what is not frozen; also of a frozen one whose flag was copied without it, in a model
# that took over parameters and persistent buffers: there the largest control parameter tells.
UNKNOWN = -1


class Selection(NamedTuple):
    """What an SSN knows beside its control parameters.

    Attributes:
        radius: 0-d.
        mean_fixed: 0-d; above 0 the mean is frozen.
        var_fixed: 0-d.
        mean_choice: 0-d, index of the frozen candidate, or -1 for the largest control parameter.
        var_choice: 0-d.
        known: Returns the indices of the frozen candidates of mean and variance as far as the host
            knows them without reading a tensor, else None.
    """

    radius: Tensor
    mean_fixed: Tensor
    var_fixed: Tensor
    mean_choice: Tensor
    var_choice: Tensor
    known: Callable[[], tuple[int | None, int | None]]


def largest(control: Tensor) -> Tensor:
    """Index of the largest entry of (..., K), the last one among equals, keeping the dimension."""
    return control.shape[-1] - 1 - control.flip(-1).argmax(-1, keepdim=True)


def fixed_ratios(
    mean_control: Tensor, var_control: Tensor, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Which of (mean, variance) are frozen, (2, 1), and the one-hot vectors, (2, K)."""
    fixed = torch.stack((selection.mean_fixed, selection.var_fixed)).unsqueeze(-1) > 0
    choice = torch.stack((selection.mean_choice, selection.var_choice)).unsqueeze(-1)
    control = torch.stack((mean_control, var_control)).detach()
    choice = torch.where(choice == UNKNOWN, largest(control), choice)
    candidates = torch.arange(control.shape[-1], device=choice.device)
    return fixed, (candidates == choice).to(control.dtype)


def importance_ratios(
    mean_control: Tensor, var_control: Tensor, selection: Selection | None
) -> tuple[Tensor, Tensor]:
    """Importance ratios as tensors, with gradient; no value is read on the host.

    Args:
        mean_control: Control parameters of the means, shape (K,).
        var_control: Control parameters of the variances, shape (K,).
        selection: What SparsestMax needs; None for the softmax of SN.
    """
    control = torch.stack((mean_control, var_control))
    if selection is None:
        return control.softmax(-1).unbind()
    fixed, one_hot = fixed_ratios(mean_control, var_control, selection)
    ratios = SparsestMaxFunction.apply(control, selection.radius)
    return torch.where(fixed, one_hot, ratios).unbind()


class Ratios(NamedTuple):
    """Importance ratios of one statistic.

    Attributes:
        values: The K ratios: floats or 0-d tensors; None for those of a tensor beside this.
        active: Indices of the candidates that take part, or whose ratio has a gradient.
        moving: Indices of the ratios with a gradient.
        pull_back: From the gradients of the K ratios, of which those that do not move are not read,
            to those of the control parameters.
        frozen: Whether no later radius changes them.
        on_simplex: Whether they sum to one whatever they come from, so that their gradients matter
            up to a common number.
    """

    values: Sequence[float | Tensor] | None
    active: Sequence[int]
    moving: Sequence[int]
    pull_back: Callable[[list[float]], list[float]] | None = None
    frozen: bool = False
    on_simplex: bool = True

    def filled(self, ratios: Tensor | None, x: Tensor) -> 'Ratios':
        """With the values of a tensor where there are none.

        Args:
            ratios: Shape (K,).
            x: The input of the layer, for the dtype in which its statistics are computed.
        """
        if self.values is not None:
            return self
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self._replace(values=ratios.to(dtype).unbind())


def unknown_ratios(ratios: Tensor, on_simplex: bool) -> Ratios:
    """Ratios in a tensor that the host may not read: all take part.

    Args:
        ratios: Shape (K,).
        on_simplex: Whether they come from a map onto the simplex.
    """
    candidates = list(range(len(ratios)))
    learns = torch.is_grad_enabled() and ratios.requires_grad
    return Ratios(None, candidates, candidates if learns else [], on_simplex=on_simplex)


def control_gradient(
    ratios: Ratios, gradients: dict[int, float | Tensor], control: Tensor
) -> Tensor:
    """Gradient of control parameters, or of the ratios themselves where those are given.

    Args:
        ratios: What was made of them.
        gradients: Index -> gradient of the ratios that move.
        control: Shape (K,), for its dtype and device.
    """
    if not ratios.moving:
        return torch.zeros_like(control)
    if ratios.pull_back is None:
        return torch.stack([gradients[k] for k in range(len(control))]).to(control.dtype)
    dp = [gradients.get(k, 0.0) for k in range(len(ratios.values))]
    return torch.tensor(ratios.pull_back(dp), dtype=control.dtype, device=control.device)


def frozen_ratios(choice: int, size: int) -> Ratios:
    """Ratios of a frozen choice among ``size`` candidates."""
    values = [0.0] * size
    values[choice] = 1.0
    return Ratios(values, [choice], [], frozen=True)


def readable(*tensors: Tensor) -> bool:
    """Whether reading values costs nothing and means anything.

    The tensors are in the memory of the host, no subclass, and nobody records what is done to them.
    """
    if is_compiling() or torch.jit.is_tracing():
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    for tensor in tensors:
        if not tensor.is_cpu or type(tensor) not in (Tensor, nn.Parameter):
            return False
    return True


def host_ratios(
    mean_control: Tensor, var_control: Tensor, ratio_map: str, selection: Selection | None
) -> list[Ratios | None]:
    """Importance ratios of means and variances, None where the host may not look.

    Args:
        mean_control: Control parameters of the means, shape (K,), or the ratios themselves.
        var_control: The same of the variances.
        ratio_map: 'sparsestmax', 'softmax', or 'given' for the ratios themselves.
        selection: What SparsestMax needs.
    """
    controls = (mean_control, var_control)
    if not readable(*controls, *(() if selection is None else selection[:5])):
        if selection is None:
            return [None, None]
        size = len(mean_control)
        return [None if k is None else frozen_ratios(k, size) for k in selection.known()]
    tracks = torch.is_grad_enabled()
    if selection is None:
        maps = _host_softmax if ratio_map == 'softmax' else _host_given
        return [maps(control.tolist(), tracks and control.requires_grad) for control in controls]
    radius, mean_fixed, var_fixed, mean_choice, var_choice, _ = selection
    return [
        _host_sparsestmax(control, radius, fixed, choice, tracks and control.requires_grad)
        for control, fixed, choice in (
            (mean_control, mean_fixed, mean_choice),
            (var_control, var_fixed, var_choice),
        )
    ]


def _host_given(values: list[float], learns: bool) -> Ratios:
    active = [k for k, value in enumerate(values) if learns or value != 0]
    return Ratios(values, active, active if learns else [], list, on_simplex=False)


def _host_softmax(z: list[float], learns: bool) -> Ratios:
    values = _softmax(z)
    active = list(range(len(z)))
    return Ratios(values, active, active if learns else [], partial(_softmax_pull_back, values))


def _host_sparsestmax(
    control: Tensor, radius: Tensor, fixed: Tensor, choice: Tensor, learns: bool
) -> Ratios:
    if fixed.item() > 0:
        index = choice.item()
        return frozen_ratios(int(largest(control)) if index == UNKNOWN else index, len(control))
    precision = torch.finfo(control.dtype).eps
    found = sparsestmax(control.tolist(), radius.item(), precision)
    moving = found.moving if learns else []
    active = moving
    if len(moving) < len(found.ratios):
        active = [k for k, value in enumerate(found.ratios) if value != 0 or k in moving]
    return Ratios(found.ratios, active, moving, found.pull_back)


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
