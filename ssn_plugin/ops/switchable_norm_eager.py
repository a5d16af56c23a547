"""ATen backend: the passes over x, for the CPU and for any device without kernels of its own.

Each function reads its full-size arguments once. Row means a (sample, channel) pair.
"""

import torch
from torch import Tensor

# Added to the row variance so that a constant row has a finite scale; far below any eps in use.
_ROW_EPS = 1e-20


def _per_row(statistic: Tensor, x: Tensor) -> Tensor:
    return statistic.reshape(statistic.shape + (1,) * (x.dim() - 2))


def standardize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre every row, at a scale that suits the backend, and keep its moments.

    ``native_group_norm`` with one group per channel is ATen's one fast route to row moments, and
    what it writes can be rescaled in place into the layer's output. On channels_last, though, it
    takes E[x^2] - E[x]^2, so there the rows are centred first.

    Args:
        x: Shape (N, C, ...), not empty, float32 or float64.

    Returns:
        Centred rows times the row scale, in the memory format of x; row mean, biased row variance
        and row scale, each (N, C).
    """
    num, channels = x.shape[:2]
    length = x.numel() // (num * channels)
    if _is_channels_last(x):
        spatial = tuple(range(2, x.dim()))
        mean = x.mean(spatial)
        centred = x - _per_row(mean, x)
        var = torch.linalg.vector_norm(centred, dim=spatial).square() / length
        return centred, mean, var, torch.ones_like(mean)
    normalized, mean, scale = torch.native_group_norm(
        x.contiguous(), None, None, num, channels, length, channels, _ROW_EPS
    )
    var = (scale.square().reciprocal() - _ROW_EPS).clamp(min=0)
    return normalized, mean, var, scale


def _is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return (
        x.dim() in formats
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=formats[x.dim()])
    )


def rescale_rows_(normalized: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``normalized * scale + shift`` in place, with one scale and one shift per row, (N, C)."""
    return normalized.mul_(_per_row(scale, normalized)).add_(_per_row(shift, normalized))


def row_sums(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of ``dy`` and of ``dy * x`` over every row, each (N, C)."""
    if x.dim() == 2:
        return dy.clone(), dy * x
    spatial = tuple(range(2, x.dim()))
    return dy.sum(spatial), (dy * x).sum(spatial)


def input_gradient(dy: Tensor, x: Tensor, gain: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """``dy * gain + x * slope + offset`` with row-wise factors, (N, C)."""
    dx = dy * _per_row(gain, x)
    return dx.addcmul_(x, _per_row(slope, x)).add_(_per_row(offset, x))
