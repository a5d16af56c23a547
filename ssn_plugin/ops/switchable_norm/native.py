"""A layer whose mean and variance are those of one normalizer: ATen's own operators for it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssn_plugin.ops.switchable_norm.aten import overflows, worth_keeping
from ssn_plugin.ops.switchable_norm.statistics import Settings, row_factor


class Native(NamedTuple):
    """How ATen computes one normalizer.

    Attributes:
        groups: Groups of group norm; None for batch norm.
        batch: Whether batch norm uses the statistics of the batch.
        factor: What the row variance of IN is multiplied by.
    """

    groups: int | None
    batch: bool = False
    factor: float = 1.0


def kind_of(x: Tensor, normalizer: str, settings: Settings, running: bool) -> Native | None:
    """How ATen computes that normalizer on ``x``, or None where it does not do so exactly.

    Args:
        x: Shape (N, C, ...), not empty.
        normalizer: The choice of mean and variance.
        settings: Of the layer.
        running: Whether 'BN' uses running statistics.
    """
    num, channels, length = _sizes(x)
    factor = row_factor(length, settings.correction)
    if normalizer == 'BN':
        # With a correction the variance that normalises is none of ATen's; and one element has no
        # unbiased variance to track.
        exact = running or (factor == 1 and num * length > 1)
        if x.is_cpu and x.element_size() < 4 and not x.is_contiguous():
            exact = False  # on channels_last its backward adds up in half precision, and overflows
        return Native(None, batch=not running) if exact else None
    # On channels_last its group norm takes E[x^2] - E[x]^2, and of a row of one element, which is
    # its own mean, it leaves the rounding error over the root of eps.
    if not x.is_contiguous() or (factor != 1 if normalizer != 'IN' else length == 1):
        return None
    groups = {'IN': channels, 'LN': 1, 'GN': settings.num_groups}.get(normalizer)
    return None if groups is None else Native(groups, factor=factor)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    num, channels = x.shape[:2]
    return num, channels, x.numel() // (num * channels)


def _in_kernel_dtypes(
    kind: Native, x: Tensor, *vectors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """``x`` and what belongs to its channels, so that statistics are computed in float32.

    ATen's batch norm takes half precision beside float32 vectors, its group norm on the CPU alone.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if kind.groups is not None and not x.is_cpu:
        x = x.to(dtype)
    return x, *(vector if vector is None else vector.to(dtype) for vector in vectors)


def _scaled_weight(kind: Native, x: Tensor, weight: Tensor | None, needed: bool) -> Tensor | None:
    """The weight for which ATen's biased variance gives what the corrected one should."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if weight is None and (needed or kind.factor != 1 or x.dtype != dtype):
        weight = torch.ones(x.shape[1], dtype=dtype, device=x.device)
    # 1 / sqrt(f var + eps) = f^-1/2 / sqrt(var + eps / f)
    return weight if kind.factor == 1 else weight * kind.factor**-0.5


def forward(
    kind: Native,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Normalise, and update the running statistics if 'BN' uses those of the batch.

    Args:
        kind: Of :func:`kind_of`.
        x: As given to it.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        running_mean: Shape (C,) or None.
        running_var: Shape (C,) or None.
        momentum: Weight of the new value.
        eps: Added to the variance.

    Returns:
        y in the dtype of x, and what spares :func:`backward` a pass over x. None where float32 is
        too narrow for squares of x; the running statistics are updated all the same.
    """
    if kind.batch and running_var is not None and momentum == 0:
        running_mean = running_var = None  # zero times an overflow would not leave them alone
    values, weight, bias, mean, var = _in_kernel_dtypes(
        kind, x, weight, bias, running_mean, running_var
    )
    weight = _scaled_weight(kind, values, weight, needed=False)
    if kind.groups is None:
        y, *kept = torch.native_batch_norm(
            values, weight, bias, mean, var, kind.batch, momentum, eps
        )
        if kind.batch and mean is not running_mean:
            running_mean.copy_(mean)
            running_var.copy_(var)
        if kind.batch and kept[1].dtype == torch.float32 and overflows(x, kept[1]):
            if running_var is not None:
                running_var.clamp_(max=torch.finfo(running_var.dtype).max)
            return None
        return y, kept
    y, *kept = torch.native_group_norm(
        values, weight, bias, *_sizes(x), kind.groups, eps / kind.factor
    )
    if kept[1].dtype == torch.float32 and overflows(x, kept[1]):
        return None
    return y.to(x.dtype), kept if worth_keeping(kept, x) else []


def backward(
    kind: Native,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    kept: Sequence[Tensor],
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias.

    Args:
        kind: Of :func:`kind_of`.
        dy: The shape and dtype of x.
        x: As in the forward, like all that is not mentioned.
        weight: Shape (C,) or None.
        running_mean: Shape (C,) or None.
        running_var: Shape (C,) or None.
        eps: Added to the variance.
        kept: What :func:`forward` returned, or nothing, and then x is read once more.
        wanted: Which gradients are wanted.
    """
    values, weight, mean, var = _in_kernel_dtypes(kind, x, weight, running_mean, running_var)
    weight = _scaled_weight(kind, values, weight, needed=any(wanted[1:]))
    dy = dy.to(values.dtype)
    if kind.groups is None:
        if x.is_cpu and x.element_size() < 4 and dy.stride() != x.stride():
            # In another layout than x's it would be summed up in half precision.
            dy = torch.empty_like(x).copy_(dy)
        return torch.ops.aten.native_batch_norm_backward(
            dy, values, weight, mean, var, *kept, kind.batch, eps, wanted
        )
    shape = _sizes(x)
    if not kept:
        eps = eps / kind.factor
        kept = torch.native_group_norm(values, weight, None, *shape, kind.groups, eps)[1:]
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        dy.contiguous(), values, *kept, weight, *shape, kind.groups, wanted
    )
    if wanted[1] and kind.factor != 1:
        dweight = dweight * kind.factor**-0.5
    return dx if dx is None else dx.to(x.dtype), dweight, dbias
