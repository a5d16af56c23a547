"""SwitchableNormFunction: dtype policy, saved tensors and the order of the passes over x.

The forward reads x once for the row moments and writes y; the backward needs two sums per row and
writes dx. For backward only x, weight and O(N * C) numbers are kept. README.md beside this file
has the derivation.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssn_plugin.ops import switchable_norm_eager as backend
from ssn_plugin.ops.statistics import (
    Moments,
    batch_statistics,
    candidate_statistics,
    correct_row_variance,
    element_gradients,
    mix,
    ratio_gradients,
    row_gradients,
)


def _full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast off: what it would lower are statistics. The meta device knows no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class SwitchableNormFunction(torch.autograd.Function):
    """Forward and backward of the layer on a non-empty x; see ``functional.switchable_norm``."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        mean_ratios: Tensor,
        var_ratios: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        normalizers: Sequence[str],
        num_groups: int,
        correction: int,
        eps: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalise ``x``.

        Args:
            ctx: Autograd context.
            x: Shape (N, C, ...), not empty.
            mean_ratios: Shape (K,).
            var_ratios: Shape (K,).
            weight: Shape (C,) or None.
            bias: Shape (C,) or None.
            running_mean: Shape (C,); if given, it and ``running_var`` are the BN statistics.
            running_var: Shape (C,).
            normalizers: K names.
            num_groups: Groups of 'GN'.
            correction: 0 or 1.
            eps: Added to the mixed variance.

        Returns:
            y in the dtype of x, and the mean and variance of the batch, (C,), or None where BN is
            no candidate or running statistics were given.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with _full_precision(x):
            length = x.numel() // (x.shape[0] * x.shape[1])
            normalized, row_mean, row_var, row_scale = backend.standardize_rows(x.to(dtype))
            rows = Moments(row_mean, correct_row_variance(row_var, length, correction))

            batch, uses_batch = None, False
            if 'BN' in normalizers:
                uses_batch = running_mean is None
                if uses_batch:
                    batch = batch_statistics(rows)
                else:
                    batch = Moments(running_mean.to(dtype)[None], running_var.to(dtype)[None])
            candidates = candidate_statistics(rows, batch, normalizers, num_groups)
            mixed = mix(candidates, mean_ratios.to(dtype), var_ratios.to(dtype))
            inverse_std = (mixed.var + eps).rsqrt()

            gain = inverse_std if weight is None else inverse_std * weight.to(dtype)
            # normalized is (x - mean_in) * row_scale: distances from the row's own mean, so that a
            # large mean costs no digits.
            shift = gain * (rows.mean - mixed.mean)
            if bias is not None:
                shift = shift + bias.to(dtype)
            y = backend.rescale_rows_(normalized, gain / row_scale, shift).to(x.dtype)

        ctx.save_for_backward(
            x,
            weight,
            mean_ratios,
            var_ratios,
            *rows,
            *(batch or (None, None)),
            mixed.mean,
            inverse_std,
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.uses_batch = uses_batch
        ctx.settings = (tuple(normalizers), num_groups, correction, length)
        if not uses_batch:
            return y, None, None
        batch_mean, batch_var = batch.mean[0], batch.var[0]
        ctx.mark_non_differentiable(batch_mean, batch_var)
        return y, batch_mean, batch_var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, both ratio vectors, weight and bias.

        Args:
            ctx: Autograd context.
            dy: The shape of x.

        Returns:
            One entry per argument of the forward pass.
        """
        (x, weight, mean_ratios, var_ratios, *saved) = ctx.saved_tensors
        row_mean, row_var, batch_mean, batch_var, mean, inverse_std = saved
        normalizers, num_groups, correction, length = ctx.settings
        dtype = row_mean.dtype
        rows = Moments(row_mean, row_var)
        batch = None if batch_mean is None else Moments(batch_mean, batch_var)
        with _full_precision(x):
            values, dy = x.to(dtype), dy.to(dtype)
            sums, products = backend.row_sums(dy, values)
            centred = products - mean * sums  # sum over the row of dy * (x - mean)

            dweight = dbias = None
            if weight is not None:
                dweight = (inverse_std * centred).sum(0).to(weight.dtype)
            if ctx.bias_dtype is not None:
                dbias = sums.sum(0).to(ctx.bias_dtype)

            gain = inverse_std if weight is None else inverse_std * weight.to(dtype)
            mixed_grad = Moments(-gain * sums, -0.5 * gain * inverse_std.square() * centred)
            dmean_ratios = dvar_ratios = None
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                candidates = candidate_statistics(rows, batch, normalizers, num_groups)
                dmean_ratios, dvar_ratios = ratio_gradients(candidates, mixed_grad)
                dmean_ratios = dmean_ratios.to(mean_ratios.dtype)
                dvar_ratios = dvar_ratios.to(var_ratios.dtype)

            dx = None
            if ctx.needs_input_grad[0]:
                row_grad = row_gradients(
                    rows,
                    batch if ctx.uses_batch else None,
                    normalizers,
                    num_groups,
                    mean_ratios.to(dtype),
                    var_ratios.to(dtype),
                    mixed_grad,
                )
                offset, slope = element_gradients(rows, row_grad, length, correction)
                dx = backend.input_gradient(dy, values, gain, slope, offset).to(x.dtype)
        return dx, dmean_ratios, dvar_ratios, dweight, dbias, None, None, None, None, None, None
