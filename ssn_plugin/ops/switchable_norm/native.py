"""A layer whose mean and variance are those of one normalizer: the ATen operator for it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssn_plugin.ops.switchable_norm.aten import worth_keeping
from ssn_plugin.ops.switchable_norm.statistics import (
    BatchStatistics,
    Moments,
    Settings,
    row_factor,
)
from ssn_plugin.torch_versions import CPU_NORMALIZES_HALF


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

    x is not empty; ``running`` says whether 'BN' uses running statistics.
    """
    if x.is_cpu and x.dtype == torch.float16 and not CPU_NORMALIZES_HALF:
        return None
    num, channels, length = _sizes(x)
    factor = row_factor(length, settings.correction)
    if normalizer == 'BN':
        # ATen has no batch norm with a correction, and one element has no unbiased variance to
        # track.
        exact = running or (factor == 1 and num * length > 1)
        if x.is_cpu and x.element_size() < 4 and not x.is_contiguous():
            exact = False  # of a strided view its backward adds up in half precision, and overflows
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
    batch: BatchStatistics,
    eps: float,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Normalise, and update the tracked running statistics.

    Returns y in the dtype of x, and what spares :func:`backward` a pass over x.
    """
    values, weight, bias = _in_kernel_dtypes(kind, x, weight, bias)
    weight = _scaled_weight(kind, values, weight, needed=False)
    if kind.groups is None:
        running = batch.tracked or batch.given or Moments(None, None)
        _, mean, var = _in_kernel_dtypes(kind, x, *running)
        y, *kept = torch.native_batch_norm(
            values, weight, bias, mean, var, kind.batch, batch.momentum, eps
        )
        if batch.tracked is not None and mean is not running.mean:
            running.mean.copy_(mean)
            running.var.copy_(var)
        return y, kept
    y, *kept = torch.native_group_norm(
        values, weight, bias, *_sizes(x), kind.groups, eps / kind.factor
    )
    return y.to(x.dtype), kept if worth_keeping(kept, x) else []


def backward(
    kind: Native,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    given: Moments | None,
    eps: float,
    kept: Sequence[Tensor],
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those that are wanted.

    ``kept`` is what :func:`forward` returned; if it is empty, x is read once more.
    """
    values, weight, mean, var = _in_kernel_dtypes(kind, x, weight, *(given or (None, None)))
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
