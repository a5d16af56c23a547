"""The training rules of SSN for a loop of one's own, without mmengine."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ssn_plugin.functional import check_not_negative
from ssn_plugin.layers.switchable import SwitchableNorm


def radius_at(
    progress: float,
    begin: float = 0.0,
    end: float = 1.0,
    start_radius: float = 0.0,
    end_radius: float = 1.0,
) -> float:
    r"""Radius of a run that has come so far.

    .. math::
        r = r_{start} + (r_{end} - r_{start}) \cdot \frac{progress - begin}{end - begin}

    with the progress clamped to [begin, end]. With the defaults, those of the paper's authors,
    layers of three candidates are one-hot after 81.65 % of the run. It depends on nothing but the
    progress, so a resumed run goes on at the exact value.

    Args:
        progress: Fraction of the run that is done, such as ``step / steps``; 1 or more at its end.
        begin: Fraction of the run at which the radius starts to grow.
        end: Fraction of the run at which it has grown.
        start_radius: Radius until ``begin``.
        end_radius: Radius from ``end`` on; three candidates are one-hot from 0.8165 on.

    Returns:
        The radius, for :func:`ssn_plugin.set_radius`.

    Raises:
        ValueError: If ``progress`` is negative or NaN, the fractions are not
            0 <= begin < end <= 1, or a radius is negative, NaN or infinite.

    Example:
        >>> from ssn_plugin import radius_at
        >>> radius_at(20 / 100, end=0.8)
        0.25

    Source:
        Shao et al., "SSN: Learning Sparse Switchable Normalization via SparsestMax", IJCV 2020.
    """
    check_not_negative(progress, 'progress')
    numbers = all(isinstance(value, int | float) for value in (begin, end))
    if not numbers or not 0 <= begin < end <= 1:
        raise ValueError(
            f'begin, end: got {begin!r}, {end!r}, expected fractions of the run with '
            '0 <= begin < end <= 1'
        )
    start_radius = check_not_negative(start_radius, 'start_radius')
    end_radius = check_not_negative(end_radius, 'end_radius')
    if math.inf in (start_radius, end_radius):
        raise ValueError(
            f'start_radius, end_radius: got {start_radius!r}, {end_radius!r}, expected finite '
            'numbers'
        )
    grown = min(max((progress - begin) / (end - begin), 0.0), 1.0)
    return start_radius + (end_radius - start_radius) * grown


def control_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Control parameters of the SSN and SN layers of a model, each once.

    Args:
        model: Any module, wrapped for distributed training or not.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN, control_parameters
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8), SSN(8))
        >>> len(control_parameters(model))
        4
    """
    return [
        parameter
        for module in model.modules()
        if isinstance(module, SwitchableNorm)
        for parameter in (module.mean_weight, module.var_weight)
    ]


def ssn_parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float | None = None,
    lr_mult: float = 0.1,
    decay_mult: float = 0.0,
) -> list[dict]:
    """Groups for an optimizer: control parameters at a tenth of the learning rate, without decay.

    A scheduler that scales every group's own learning rate keeps the ratio, as nearly all of torch
    do. ``OneCycleLR`` and ``CyclicLR`` set learning rates instead: give them one per group.

    Args:
        model: Any module.
        lr: Learning rate of all other parameters.
        weight_decay: Their weight decay; None leaves it to the optimizer's own.
        lr_mult: Factor on the learning rate of control parameters.
        decay_mult: Factor on their weight decay. Needs ``weight_decay`` unless it is 0.

    Returns:
        The group of all others, then that of the control parameters; one that would be empty is
        left out.

    Raises:
        ValueError: If a number is negative or none, or ``decay_mult`` has nothing to multiply.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN, ssn_parameter_groups
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8))
        >>> groups = ssn_parameter_groups(model, lr=0.5, weight_decay=1e-4)
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9)
        >>> [(len(group['params']), group['lr'], group['weight_decay']) for group in groups]
        [(4, 0.5, 0.0001), (2, 0.05, 0.0)]
    """
    numbers = dict(lr=lr, weight_decay=weight_decay or 0, lr_mult=lr_mult, decay_mult=decay_mult)
    for name, number in numbers.items():
        check_not_negative(number, name)
    if weight_decay is None and decay_mult:
        raise ValueError(f'decay_mult: got {decay_mult!r} without weight_decay, expected both or 0')
    control = control_parameters(model)
    known = {id(parameter) for parameter in control}
    others = {'params': [p for p in model.parameters() if id(p) not in known], 'lr': lr}
    if weight_decay is not None:
        others['weight_decay'] = weight_decay
    own = {'params': control, 'lr': lr * lr_mult, 'weight_decay': (weight_decay or 0) * decay_mult}
    return [group for group in (others, own) if group['params']]


def clip_control_gradients(model: nn.Module | Iterable[Tensor], max_norm: float = 1.0) -> Tensor:
    """Clip the norm of the joint gradient of all control parameters.

    Near a tie of two candidates their gradient is steep. Call this after the backward pass, on
    gradients that are accumulated and unscaled, and before any clipping of all gradients, so that
    one such layer does not shrink the step of all others.

    If one of these gradients holds NaN or infinity, clipping by the joint norm would spoil all of
    them, and a control parameter that an optimizer has made NaN stays NaN. So this function then
    sets ``grad`` to None for all of them, and the optimizer skips the control parameters in this
    step. The check waits for the device once.

    Args:
        model: The model, or its :func:`control_parameters`, which a loop may collect once.
        max_norm: The largest norm; 1 is that of the paper's authors.

    Returns:
        The norm as it was; NaN if it was not finite.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN, clip_control_gradients
        >>> layer = SSN(8)
        >>> (layer(torch.randn(4, 8, 5, 5)) ** 3).sum().mul(1e4).backward()
        >>> bool(clip_control_gradients(layer) > 1)
        True
        >>> print(f'{clip_control_gradients(layer):.3f}')
        1.000
    """
    parameters = control_parameters(model) if isinstance(model, nn.Module) else list(model)
    return clip_or_drop(parameters, max_norm, without_finite_gradient(parameters))


def clip_or_drop(parameters: list[Tensor], max_norm: float, lost: list[int]) -> Tensor:
    """Clip gradients, or take them all away if some are known to be without finite values."""
    if lost:
        for parameter in parameters:
            parameter.grad = None
        return torch.tensor(math.nan)
    return clip_grad_norm_(parameters, max_norm)


def without_finite_gradient(parameters: Sequence[Tensor]) -> list[int]:
    """Which parameters, by their index, have a gradient with a number that is NaN or infinite."""
    indices = [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
    if not indices:
        return []
    gradients = [parameters[index].grad.flatten() for index in indices]
    joined = torch.cat([gradient.to(gradients[0]) for gradient in gradients])
    if bool(joined.isfinite().all()):
        return []
    return [i for i, g in zip(indices, gradients, strict=True) if not bool(g.isfinite().all())]
