"""From the moments of every (sample, channel) row to the statistics of IN, LN, BN and GN, and back.

One read of x gives the row moments (mean_in, var_in), both (N, C). All else follows from them by
the law of total variance, var = mean(var_in) + var(mean_in), never by E[x^2] - E[x]^2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')


class Moments(NamedTuple):
    """A mean and a variance, of shapes that broadcast to (N, C)."""

    mean: Tensor
    var: Tensor


def correct_row_variance(var: Tensor, length: int, correction: int) -> Tensor:
    """Row variance with divisor ``length - correction``; a row of one element keeps its zero.

    Args:
        var: Biased row variance.
        length: Elements per row.
        correction: 0 or 1, as in ``torch.var``.
    """
    return var * _row_factor(length, correction)


def _row_factor(length: int, correction: int) -> float:
    return length / (length - 1) if correction and length > 1 else 1.0


def _groups(normalizer: str, channels: int, num_groups: int) -> int:
    return {'IN': channels, 'LN': 1, 'GN': num_groups}[normalizer]


def _pool(moments: Moments, dim: int) -> Moments:
    """Law of total variance along ``dim``."""
    mean = moments.mean.mean(dim, keepdim=True)
    within = moments.var.mean(dim, keepdim=True)
    between = (moments.mean - mean).square().mean(dim, keepdim=True)
    return Moments(mean, within + between)


def _split(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0], groups, -1)


def batch_statistics(rows: Moments) -> Moments:
    """BN statistics, shape (1, C), from row moments (N, C)."""
    return _pool(rows, 0)


def candidate_statistics(
    rows: Moments, batch: Moments | None, normalizers: Sequence[str], num_groups: int
) -> list[Moments]:
    """Statistics of every candidate.

    Args:
        rows: Row moments, (N, C).
        batch: BN statistics, (1, C): of this batch or running ones. None if BN is no candidate.
        normalizers: Names of the candidates.
        num_groups: Groups of 'GN'.

    Returns:
        One pair per candidate, each expanded to (N, C).
    """
    shape = rows.mean.shape
    candidates = []
    for normalizer in normalizers:
        if normalizer == 'BN':
            found = batch
        elif normalizer == 'IN':
            found = rows
        else:
            groups = _groups(normalizer, shape[1], num_groups)
            found = _pool(Moments(*(_split(m, groups) for m in rows)), -1)
            found = Moments(*(m.expand(-1, -1, shape[1] // groups).reshape(shape) for m in found))
        candidates.append(Moments(found.mean.expand(shape), found.var.expand(shape)))
    return candidates


def mix(candidates: list[Moments], mean_ratios: Tensor, var_ratios: Tensor) -> Moments:
    """``sum_k p_k mean_k`` and ``sum_k p'_k var_k``.

    Args:
        candidates: K pairs of shape (N, C).
        mean_ratios: Shape (K,).
        var_ratios: Shape (K,).
    """
    mean = torch.zeros_like(candidates[0].mean)
    var = torch.zeros_like(candidates[0].var)
    for k, candidate in enumerate(candidates):
        mean.addcmul_(candidate.mean, mean_ratios[k])
        var.addcmul_(candidate.var, var_ratios[k])
    return Moments(mean, var)


def ratio_gradients(candidates: list[Moments], grad: Moments) -> tuple[Tensor, Tensor]:
    """Gradients of both ratio vectors from the gradient of the mixed moments, each (K,)."""
    mean = torch.stack([(grad.mean * candidate.mean).sum() for candidate in candidates])
    var = torch.stack([(grad.var * candidate.var).sum() for candidate in candidates])
    return mean, var


def row_gradients(
    rows: Moments,
    batch: Moments | None,
    normalizers: Sequence[str],
    num_groups: int,
    mean_ratios: Tensor,
    var_ratios: Tensor,
    grad: Moments,
) -> Moments:
    """Adjoint of row moments -> candidates -> mix.

    Args:
        rows: Row moments, (N, C).
        batch: BN statistics of this batch, (1, C); None if BN is no candidate or uses running
            statistics, which are constants.
        normalizers: Names of the candidates.
        num_groups: Groups of 'GN'.
        mean_ratios: Shape (K,).
        var_ratios: Shape (K,).
        grad: Gradient of the mixed moments, (N, C).

    Returns:
        Gradient of the row moments, (N, C).
    """
    shape = rows.mean.shape
    d_mean = torch.zeros_like(rows.mean)
    d_var = torch.zeros_like(rows.var)
    for k, normalizer in enumerate(normalizers):
        # Rows pooled into one statistic share its gradient: mean of the gradients to each mean and
        # variance, and through var(mean_in) another 2 * (mean_in - mean) of the variance's.
        if normalizer == 'IN':
            pooled_mean, pooled_var, deviation = grad.mean, grad.var, None
        elif normalizer == 'BN':
            if batch is None:
                continue
            pooled_mean = grad.mean.mean(0, keepdim=True)
            pooled_var = grad.var.mean(0, keepdim=True)
            deviation = rows.mean - batch.mean
        else:
            groups = _groups(normalizer, shape[1], num_groups)
            means = _split(rows.mean, groups)
            deviation = (means - means.mean(-1, keepdim=True)).reshape(shape)
            pooled_mean, pooled_var = (
                _split(g, groups)
                .mean(-1, keepdim=True)
                .expand(-1, -1, shape[1] // groups)
                .reshape(shape)
                for g in grad
            )
        d_mean += mean_ratios[k] * pooled_mean
        d_var += var_ratios[k] * pooled_var
        if deviation is not None:
            d_mean += 2 * var_ratios[k] * pooled_var * deviation
    return Moments(d_mean, d_var)


def element_gradients(rows: Moments, grad: Moments, length: int, correction: int) -> Moments:
    """Gradient of x from that of its row moments, as ``dx = slope * x + offset`` per row.

    Args:
        rows: Row moments, (N, C).
        grad: Gradient of the row mean and of the corrected row variance, (N, C).
        length: Elements per row.
        correction: 0 or 1.

    Returns:
        The pair (offset, slope), each (N, C).
    """
    slope = grad.var * (2 * _row_factor(length, correction) / length)
    return Moments(grad.mean / length - slope * rows.mean, slope)
