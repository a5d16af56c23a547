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
    """Standardise every row and keep its moments.

    ``native_group_norm`` with one group per channel is ATen's one fast route to row moments, and
    what it writes can be rescaled in place into the layer's output.

    Args:
        x: Shape (N, C, ...), not empty, float32 or float64.

    Returns:
        Standardised x; row mean, biased row variance and the row scale that was applied, (N, C).
    """
    num, channels = x.shape[:2]
    length = x.numel() // (num * channels)
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    dense = x if channels_last else x.contiguous()
    normalized, mean, scale = torch.native_group_norm(
        dense, None, None, num, channels, length, channels, _ROW_EPS
    )
    var = (scale.square().reciprocal() - _ROW_EPS).clamp(min=0)
    return normalized, mean, var, scale


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
