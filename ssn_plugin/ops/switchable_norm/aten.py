"""The ATen backend: any mixture, on any device.

A row is one (sample, channel) pair. README.md in ops/ has the derivation, and says which operator
makes which pass over x and why.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ssn_plugin.ops.switchable_norm.collectives import (
    BatchMoments,
    all_reduce_gradients,
    all_reduce_moments,
    track,
)
from ssn_plugin.ops.switchable_norm.ratios import Ratios, readable
from ssn_plugin.ops.switchable_norm.statistics import (
    BatchStatistics,
    Mixed,
    Moments,
    RowGradients,
    Settings,
    mix_statistics,
    row_factor,
    row_gradients,
    takes_part,
)

# Added to the row variance so that a constant row has a finite scale; far below any eps in use.
_ROW_EPS = 1e-20
# From so many elements on a pass is worth an operator of higher fixed cost.
_MANY = 2**15
# Rows of fewer elements are passed over faster three times by plain operators than once by ATen's
# normalizers, which work row by row.
_SHORT = 256
# Below so many bytes of x, always save the statistics for backward.
_SMALL = 2**20


class Rows(NamedTuple):
    """Moments of every row, (N, C), and ``(x - mean) * scale`` where it comes with them.

    A variance of None is zero, or was not asked for; a scale of None is one.
    """

    mean: Tensor
    var: Tensor | None
    normalized: Tensor | None = None
    scale: Tensor | None = None


# Passes over x


def _per_row(statistic: Tensor, x: Tensor) -> Tensor:
    if statistic.dim() == 1:
        return statistic.view(-1, *(1,) * (x.dim() - 2))
    return statistic.reshape(*statistic.shape, *(1,) * (x.dim() - 2))


def _reshaped(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the shape of ``x``, not as a view: autograd lets nobody change one in place."""
    return torch.ops.aten._unsafe_view(y, x.shape)


def _flat(statistic: Tensor) -> Tensor:
    # A tensor expanded from one number keeps stride 0 through reshape, and ATen's BatchNorm
    # kernels read their vectors without looking at strides, so a real copy is needed.
    return statistic.reshape(-1).contiguous()


def _length(x: Tensor) -> int:
    return x.numel() // (x.shape[0] * x.shape[1])


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() > 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _by_sample(x: Tensor) -> bool:
    """Whether ATen's BatchNorm, one sample at a time, is the fast route to the sums of rows."""
    return x.numel() >= len(x) * _MANY and _is_channels_last(x) and readable(x)


def row_means(x: Tensor) -> Tensor:
    """Mean of every row, (N, C)."""
    return x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x


def row_moments(x: Tensor) -> Rows:
    """Moments of every row, the variance biased.

    x is not empty, float32 or float64.
    """
    num, channels = x.shape[:2]
    length = _length(x)
    if length == 1:
        return Rows(x.reshape(num, channels), None)
    if _is_channels_last(x):
        # Here ATen's group norm would take E[x^2] - E[x]^2.
        mean = row_means(x)
        if not _by_sample(x):
            return Rows(mean, (x - _per_row(mean, x)).square_().mean(tuple(range(2, x.dim()))))
        # The mean that comes with these variances was added up one by one.
        found = [torch.batch_norm_update_stats(sample[None], None, None, 0.0) for sample in x]
        return Rows(mean, torch.stack([var for _, var in found]))
    if length < _SHORT and x.is_contiguous():
        mean = row_means(x)
        centred = x - _per_row(mean, x)
        norm = torch.linalg.vector_norm(centred, dim=tuple(range(2, x.dim())))
        return Rows(mean, norm.square_().div_(length), centred)
    normalized, mean, scale = torch.native_group_norm(
        x.contiguous(), None, None, num, channels, length, channels, _ROW_EPS
    )
    return Rows(mean, scale.pow(-2), normalized, scale)


def row_sums(dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over every row of ``dy`` and of ``dy * (x - mean) * scale``, each (N, C).

    ``mean`` and ``scale`` broadcast to (N, C).
    """
    num, channels = shape = x.shape[:2]
    length = _length(x)
    if length == 1:
        dy, x = dy.reshape(shape), x.reshape(shape)
        return dy, (x - mean).mul_(dy).mul_(scale)
    if _by_sample(x):
        dy = torch.empty_like(x).copy_(dy) if dy.stride() != x.stride() else dy
        found = [
            _channel_sums(*sample)
            for sample in zip(dy, x, mean.expand(shape), scale.expand(shape), strict=True)
        ]
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))
    if _is_channels_last(x) or not x.is_contiguous():
        spatial = tuple(range(2, x.dim()))
        sums, products = dy.sum(spatial), (dy * x).sum(spatial)
        return sums, (products - mean * sums) * scale
    rows = (num * channels, length)
    sums, products = _channel_sums(
        dy.contiguous().view(rows), x.view(rows), mean.expand(shape), scale.expand(shape)
    )
    return sums.view(shape), products.view(shape)


def _channel_sums(dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`row_sums` for x of shape (C, ...): the gradients of BatchNorm's affine map."""
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        dy[None],
        x[None],
        None,
        None,
        None,
        _flat(mean),
        _flat(scale),
        True,
        0.0,
        [False, True, True],
    )
    return sums, products


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` with row-wise factors that broadcast to (N, C)."""
    if x.numel() < _MANY or not x.is_contiguous():
        return torch.addcmul(_per_row(shift, x), x, _per_row(scale, x))
    return _reshaped(torch.native_batch_norm(*_as_batch_norm(x, scale, shift))[0], x)


def affine_(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """:func:`affine` in place; ``x`` is contiguous."""
    if x.numel() < _MANY or _length(x) < _SHORT or not readable(x):
        return x.mul_(_per_row(scale, x)).add_(_per_row(shift, x))
    arguments = _as_batch_norm(x, scale, shift)
    nothing = x.new_empty(0)
    torch.native_batch_norm(*arguments, out=(arguments[0], nothing, nothing))
    return x


def _as_batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple:
    """Arguments with which BatchNorm is a row-wise affine map, in one pass over x.

    That is BatchNorm with known statistics, over one sample of N * C channels.
    """
    shape = x.shape[:2]
    rows = x.view(1, shape.numel(), -1)
    scale, shift = _flat(scale.expand(shape)), _flat(shift.expand(shape))
    return rows, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0


# The layer


def worth_keeping(tensors: Sequence[Tensor | None], x: Tensor) -> bool:
    """Whether these may be kept for backward: few bytes beside those of x, unless x is small."""
    size = x.numel() * x.element_size()
    if size < _SMALL:
        return True
    return 64 * sum(t.numel() * t.element_size() for t in tensors if t is not None) <= size


def _corrected_moments(x: Tensor, correction: int) -> Rows:
    rows, factor = row_moments(x), row_factor(_length(x), correction)
    return rows if factor == 1 else rows._replace(var=rows.var * factor)


def _mixed_statistics(
    x: Tensor,
    mean_ratios: Ratios,
    var_ratios: Ratios,
    given: Moments | None,
    settings: Settings,
    batch_too: bool = False,
) -> tuple[Rows, Mixed]:
    """Moments of the rows and what is mixed from them."""
    if batch_too or any(
        given is None or settings.normalizers[k] != 'BN' for k in var_ratios.active
    ):
        rows = _corrected_moments(x, settings.correction)
    else:
        rows = Rows(row_means(x), None)
    moments = Moments(rows.mean, rows.var)
    return rows, mix_statistics(moments, mean_ratios, var_ratios, given, settings, batch_too)


def _wide(x: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    """In the dtype in which the layer computes, float32 or float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dtype != dtype:
        x = x.to(dtype)
    return [x, *[v if v is None or v.dtype == dtype else v.to(dtype) for v in vectors]]


def _wide_moments(x: Tensor, moments: Moments | None) -> Moments | None:
    return None if moments is None else Moments(*_wide(x, *moments)[1:])


def forward(
    x: Tensor,
    mean_ratios: Ratios,
    var_ratios: Ratios,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: BatchStatistics,
    settings: Settings,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, list[Tensor | None], BatchMoments | None]:
    """Normalise.

    Args:
        x: Shape (N, C, ...), not empty.
        mean_ratios: Ratios of the means.
        var_ratios: Ratios of the variances.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        batch: What stands for the statistics of 'BN', or is updated by those of the batch.
        settings: What else the layer is.
        group: Processes whose rows all count for 'BN'.

    Returns:
        y in the dtype of x; what spares :func:`backward` a pass over x; the moments of the joined
        batch if there is a group.
    """
    values, weight, bias = _wide(x, weight, bias)
    tracks, joined = batch.tracked is not None, None
    if group is None:
        given = _wide_moments(x, batch.given)
        rows, mixed = _mixed_statistics(values, mean_ratios, var_ratios, given, settings, tracks)
    else:
        rows = _corrected_moments(values, settings.correction)
        moments = Moments(rows.mean, rows.var)
        joined = all_reduce_moments(moments, _length(x), group)
        given = Moments(joined.mean, joined.var)
        mixed = mix_statistics(moments, mean_ratios, var_ratios, given, settings, batch_too=True)
    gain = mixed.inverse_std if weight is None else mixed.inverse_std * weight
    y = _apply(values, rows, mixed.distance, gain, bias)
    if tracks and joined is not None:
        track(batch.tracked, joined, batch.momentum, settings.correction)
    elif tracks:
        _track(batch, rows, mixed, settings, x)
    constant = group is None and given is not None
    kept = _kept(x, rows, mixed, mean_ratios, var_ratios, constant, settings)
    return y.to(x.dtype), kept, joined


def _unscaled(factor: Tensor, rows: Rows) -> Tensor:
    """Factor of ``rows.normalized`` that does what ``factor`` does to ``x - mean``."""
    return factor if rows.scale is None else factor / rows.scale


def _apply(x: Tensor, rows: Rows, distance: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """``(x - row mean + distance) * gain + bias``; overwrites ``rows.normalized``."""
    shift = gain * distance if bias is None else torch.addcmul(bias, gain, distance)
    if rows.normalized is not None:
        return affine_(rows.normalized, _unscaled(gain, rows), shift)
    if _length(x) == 1:
        return _reshaped(shift.expand(x.shape[:2]).contiguous(), x)
    if x.numel() < _MANY:
        centred = x - _per_row(rows.mean, x)
        return torch.addcmul(_per_row(shift, x), centred, _per_row(gain, x))
    return affine(x, gain, torch.addcmul(shift, gain, rows.mean, value=-1))


def _track(batch: BatchStatistics, rows: Rows, mixed: Mixed, settings: Settings, x: Tensor) -> None:
    k, num = settings.normalizers.index('BN'), len(x)
    # The row mean minus its deviation is the mean of the batch, the same for all samples.
    mean = rows.mean[0] - mixed.deviations[k][0]
    count = num * _length(x)
    unbiased = count / (count - 1) if settings.correction == 0 and count > 1 else 1.0
    running_mean, running_var = batch.tracked
    running_mean.lerp_(mean.to(running_mean.dtype), batch.momentum)
    var = mixed.totals[k] * (unbiased / num)
    running_var.lerp_(var.to(running_var.dtype), batch.momentum)


def _kept(
    x: Tensor,
    rows: Rows,
    mixed: Mixed,
    mean_ratios: Ratios,
    var_ratios: Ratios,
    constant: bool,
    settings: Settings,
) -> list[Tensor | None]:
    """All statistics that backward reads, only the row moments, or nothing.

    The first spares backward the most work, the last needs the least memory; what is taken is
    little beside x.
    """
    kept = [rows.mean, mixed.distance, mixed.inverse_std]
    for k, deviation in enumerate(mixed.deviations):
        pooled = k in var_ratios.active and not (constant and settings.normalizers[k] == 'BN')
        kept.append(deviation if pooled or k in mean_ratios.moving else None)
    for k, total in enumerate(mixed.totals):
        kept.append(total if k in var_ratios.moving else None)
    if worth_keeping(kept, x):
        return kept
    moments = [rows.mean, rows.var]
    return moments if worth_keeping(moments, x) else []


def backward(
    dy: Tensor,
    x: Tensor,
    mean_ratios: Ratios,
    var_ratios: Ratios,
    weight: Tensor | None,
    given: Moments | None,
    settings: Settings,
    kept: list[Tensor | None],
    needs_dx: bool,
    joined: BatchMoments | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor | None, dict[int, float | Tensor], dict[int, float | Tensor], Tensor, Tensor]:
    """Gradients of one call of :func:`forward`.

    Args:
        dy: The shape and dtype of x.
        x: As in the forward, like all that is not mentioned.
        mean_ratios: Ratios of the means.
        var_ratios: Ratios of the variances.
        weight: Shape (C,) or None.
        given: What stood for the statistics of 'BN', (C,) each, or None.
        settings: What else the layer is.
        kept: What :func:`forward` returned, or nothing, and then x is read once more.
        needs_dx: Whether dx is wanted.
        joined: The moments of the joined batch, if there is a group.
        group: As in the forward.

    Returns:
        dx or None; index -> gradient of the ratios that move, of the means and of the variances;
        dweight and dbias, (C,).
    """
    values, dy, weight = _wide(x, dy, weight)
    given = _wide_moments(x, given if group is None else Moments(joined.mean, joined.var))
    statistics = (mean_ratios, var_ratios, given, settings, group is not None)
    if not kept:
        rows, mixed = _mixed_statistics(values, *statistics)
    elif len(kept) == 2:
        rows = Rows(*kept)
        mixed = mix_statistics(Moments(*kept), *statistics)
    else:
        size = len(settings.normalizers)
        mean, distance, inverse_std = kept[:3]
        rows = Rows(mean, None)
        mixed = Mixed(distance, inverse_std, kept[3 : 3 + size], kept[3 + size :])

    sums, products = _row_sums_of(dy, values, rows, mixed)
    gain = mixed.inverse_std if weight is None else mixed.inverse_std * weight
    grad = Moments(gain * sums, (gain * mixed.inverse_std) * products)
    shared = None
    if group is not None and needs_dx and takes_part('BN', mean_ratios, var_ratios, settings):
        shared = all_reduce_gradients(grad, joined.count, group)
    grads = row_gradients(
        grad,
        Moments(rows.mean, rows.var),
        mixed,
        mean_ratios,
        var_ratios,
        given is not None,
        settings,
        _length(x),
        shared,
    )
    dx = _input_gradient(dy, values, rows, gain, grads).to(x.dtype) if needs_dx else None
    return dx, grads.mean_ratios, grads.var_ratios, products.sum(0), sums.sum(0)


def _row_sums_of(dy: Tensor, x: Tensor, rows: Rows, mixed: Mixed) -> tuple[Tensor, Tensor]:
    """Sums over every row of ``dy`` and of dy times what the layer normalises x to."""
    if rows.normalized is None:
        return row_sums(dy, x, rows.mean - mixed.distance, mixed.inverse_std)
    centre = -mixed.distance if rows.scale is None else -mixed.distance * rows.scale
    return row_sums(dy, rows.normalized, centre, _unscaled(mixed.inverse_std, rows))


def _input_gradient(dy: Tensor, x: Tensor, rows: Rows, gain: Tensor, grads: RowGradients) -> Tensor:
    """``dy * gain + (x - row mean) * slope + offset``; overwrites ``rows.normalized``."""
    gain, offset = _per_row(gain, x), grads.offset
    if grads.slope is None:
        return torch.addcmul(_per_row(offset, x), dy, gain)
    if rows.normalized is not None:
        centred = affine_(rows.normalized, _unscaled(grads.slope, rows), offset)
    else:
        offset = torch.addcmul(offset, grads.slope, rows.mean, value=-1)
        centred = affine(x, grads.slope, offset)
    return centred.addcmul_(dy, gain)
