"""From the moments of every (sample, channel) row to the mixed statistics of the layer, and back.

One read of x gives the row moments (mean_in, var_in), both (N, C). All else follows from them by
the law of total variance, var = mean(var_in) + var(mean_in), never by E[x^2] - E[x]^2.

Means are carried as distances from the row's own mean, which stay small where the means are large.
A statistic has the shape of what shares it and broadcasts to (N, C): LN (N, 1), BN (C,), the others
(N, C).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ssn_plugin.ops.switchable_norm.ratios import Ratios

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')


class Settings(NamedTuple):
    """What a layer is, as far as its statistics go."""

    normalizers: tuple[str, ...]
    num_groups: int
    correction: int
    eps: float


class Moments(NamedTuple):
    """A mean and a variance; a variance of None is zero, or was not asked for."""

    mean: Tensor
    var: Tensor | None


class BatchStatistics(NamedTuple):
    """What 'BN' does with running statistics; without either it takes those of the batch alone.

    Attributes:
        tracked: Running statistics, (C,) each, that are updated in place by those of the batch.
        given: Running statistics, (C,) each, that stand for those of the batch.
        momentum: Weight of the new value for ``tracked``, a number or a 0-d tensor.
    """

    tracked: Moments | None = None
    given: Moments | None = None
    momentum: float | Tensor = 0.0


class Mixed(NamedTuple):
    """Mixed statistics and, for every candidate, what they were mixed from.

    Attributes:
        distance: Row mean minus mixed mean.
        inverse_std: ``1 / sqrt(mixed variance + eps)``.
        deviations: Row mean minus the candidate's mean, (N, C); None for 'IN', whose is zero, and
            where nobody asks.
        totals: The candidate's variance times its :func:`pool_size`; None for zero, and where
            nobody asks.
    """

    distance: Tensor
    inverse_std: Tensor
    deviations: list[Tensor | None]
    totals: list[Tensor | None]


def takes_part(normalizer: str, mean: Ratios, var: Ratios, settings: Settings) -> bool:
    """Whether a candidate takes part in the mixture."""
    if normalizer not in settings.normalizers:
        return False
    k = settings.normalizers.index(normalizer)
    return k in mean.active or k in var.active


def row_factor(length: int, correction: int) -> float:
    """Row variance with divisor ``length - correction``, in units of the biased one.

    A row of one element keeps its zero.
    """
    return length / (length - 1) if correction and length > 1 else 1.0


def pool_size(normalizer: str, shape: tuple[int, int], num_groups: int) -> int:
    """How many rows share a statistic; ``shape`` is (N, C)."""
    num, channels = shape
    if normalizer == 'IN':
        return 1
    if normalizer == 'GN':
        return channels // num_groups
    return num if normalizer == 'BN' else channels


def pool_total(values: Tensor, normalizer: str, num_groups: int) -> Tensor:
    """Sum of one number per row, (N, C), over the rows that share a statistic."""
    if normalizer == 'IN':
        return values
    if normalizer == 'LN':
        return values.sum(1, keepdim=True)
    if normalizer == 'BN':
        return values.sum(0)
    num, channels = values.shape
    totals = values.reshape(num, num_groups, -1).sum(-1, keepdim=True)
    return totals.expand(-1, -1, channels // num_groups).reshape(num, channels)


def _sum(terms: list[tuple], rows: Tensor, start: float = 0.0) -> Tensor:
    """``start + sum(ratio * factor * product)``, in two dimensions, broadcasting to (N, C).

    Args:
        terms: Tuples of a ratio, a number or a 0-d tensor, another number and one or two tensors
            to be multiplied.
        rows: For dtype and device.
        start: Number to begin with.
    """
    total = torch.full((1, 1), start, dtype=rows.dtype, device=rows.device)
    for ratio, factor, first, *second in terms:
        if isinstance(ratio, Tensor):
            first, second = (first * ratio, second) if second else (first, [ratio])
        else:
            factor *= ratio
        if second:
            total = torch.addcmul(total, first, *second, value=factor)
        else:
            total = torch.add(total, first, alpha=factor)
    return total


def _dot(first: Tensor | None, second: Tensor, ratio: float | Tensor, factor: float):
    """Inner product times ``factor``: a number where ratios are numbers, else a 0-d tensor."""
    as_number = isinstance(ratio, float)
    if first is None:
        return 0.0 if as_number else second.new_zeros(())
    product = torch.dot(first.reshape(-1), second.reshape(-1))
    return (product.item() if as_number else product) * factor


def mix_statistics(
    rows: Moments,
    mean_ratios: Ratios,
    var_ratios: Ratios,
    given: Moments | None,
    settings: Settings,
    batch_too: bool = False,
) -> Mixed:
    """Statistics of the candidates that take part, and their mixtures.

    Args:
        rows: Row moments, (N, C), the variance corrected; it may be None where every row has
            variance zero or no candidate of ``var_ratios`` comes from rows.
        mean_ratios: Importance ratios of the means.
        var_ratios: Importance ratios of the variances.
        given: Statistics that stand for those of 'BN', (C,).
        settings: Of the layer.
        batch_too: Whether those of 'BN' are wanted although it may take no part.
    """
    deviations, totals, mean_terms, var_terms = [], [], [], []
    for k, name in enumerate(settings.normalizers):
        too = batch_too and name == 'BN'
        in_mean, in_var = k in mean_ratios.active or too, k in var_ratios.active or too
        size, deviation, total = 1, None, None
        if name == 'IN':
            total = rows.var if in_var else None
        elif name == 'BN' and given is not None:
            deviation = rows.mean - given.mean if in_mean else None
            total = given.var if in_var else None
        elif in_mean or in_var:
            size = pool_size(name, rows.mean.shape, settings.num_groups)
            pooled = pool_total(rows.mean, name, settings.num_groups)
            deviation = torch.sub(rows.mean, pooled, alpha=1 / size)
            if in_var:
                if rows.var is None:
                    square = deviation.square()
                else:
                    square = torch.addcmul(rows.var, deviation, deviation)
                total = pool_total(square, name, settings.num_groups)
        if deviation is not None and k in mean_ratios.active:
            mean_terms.append((mean_ratios.values[k], 1.0, deviation))
        if total is not None and k in var_ratios.active:
            var_terms.append((var_ratios.values[k], 1 / size, total))
        deviations.append(deviation)
        totals.append(total)

    if not mean_ratios.on_simplex:
        # x minus the mixture of means has a part of the mean itself left.
        rest = 1.0 - sum(mean_ratios.values[k] for k in mean_ratios.active)
        if isinstance(rest, Tensor) or rest != 0:
            mean_terms.append((rest, 1.0, rows.mean))
    alone = len(mean_terms) == 1 and isinstance(mean_terms[0][0], float) and mean_terms[0][0] == 1
    distance = mean_terms[0][-1] if alone else _sum(mean_terms, rows.mean)
    inverse_std = _sum(var_terms, rows.mean, settings.eps).rsqrt_()
    return Mixed(distance, inverse_std, deviations, totals)


class RowGradients(NamedTuple):
    """What :func:`row_gradients` returns.

    Attributes:
        offset: With ``slope`` the part of dx that comes through the statistics,
            ``slope * (x - row mean) + offset``, broadcasting to (N, C).
        slope: None for zero, and where every row is one element.
        mean_ratios: Index -> gradient of an importance ratio of the means that has one.
        var_ratios: The same of the variances.
    """

    offset: Tensor
    slope: Tensor | None
    mean_ratios: dict[int, float | Tensor]
    var_ratios: dict[int, float | Tensor]


def row_gradients(
    grad: Moments,
    rows: Moments,
    mixed: Mixed,
    mean_ratios: Ratios,
    var_ratios: Ratios,
    constant: bool,
    settings: Settings,
    length: int,
    shared: Moments | None = None,
) -> RowGradients:
    """Adjoint of x -> row moments -> :func:`mix_statistics`.

    Args:
        grad: Gradient of the mixed mean times -1 and of the mixed variance times -2, (N, C) each.
        rows: As given to :func:`mix_statistics`.
        mixed: What it returned.
        mean_ratios: As given to it.
        var_ratios: As given to it.
        constant: Whether statistics that were given stood for those of 'BN'.
        settings: As given to it.
        length: Elements per row.
        shared: If the given statistics are those of the batches of several processes: the sums of
            ``grad`` over all their rows, divided by the elements per channel, (C,) each. None where
            the given statistics are constants.
    """
    grad_mean, grad_var = grad
    shape = grad_mean.shape
    offset_terms, slope_terms, products = [], [], []
    dmean, dvar = {}, {}
    for k, name in enumerate(settings.normalizers):
        stands_in = constant and name == 'BN'
        varies = not stands_in or shared is not None
        size = 1 if stands_in else pool_size(name, shape, settings.num_groups)
        weight = -1.0 if stands_in else -1 / (size * length)
        ratio = mean_ratios.values[k]
        if k in mean_ratios.active and varies:
            total = shared.mean if stands_in else pool_total(grad_mean, name, settings.num_groups)
            offset_terms.append((ratio, weight, total))
        if k in mean_ratios.moving:
            dmean[k] = _dot(mixed.deviations[k], grad_mean, ratio, 1.0)
        ratio = var_ratios.values[k]
        if k in var_ratios.active:
            pooled = pool_total(grad_var, name, settings.num_groups)
            if varies:
                slope_terms.append((ratio, weight, shared.var if stands_in else pooled))
                if mixed.deviations[k] is not None:
                    products.append((*slope_terms[-1], mixed.deviations[k]))
            if k in var_ratios.moving:
                # A statistic that is there once for all its rows meets the sum of their gradients.
                total = mixed.totals[k]
                other = grad_var if total is None or total.shape == shape else pooled
                dvar[k] = _dot(total, other, ratio, -0.5 / size)
    if dmean and not mean_ratios.on_simplex:
        common = _dot(rows.mean, grad_mean, mean_ratios.values[0], -1.0)
        dmean = {k: gradient + common for k, gradient in dmean.items()}

    offset = _sum(offset_terms + products, grad_mean)
    slope = None
    if slope_terms and length > 1:
        factor = row_factor(length, settings.correction)
        slope = _sum([(r, factor * f, *t) for r, f, *t in slope_terms], grad_mean)
    return RowGradients(offset, slope, dmean, dvar)
