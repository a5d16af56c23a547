"""The autograd function of the Triton backend: all of a layer in one forward and one backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssn_plugin.ops.switchable_norm.statistics import Settings
from ssn_plugin.ops.switchable_norm.triton import launch as triton
from ssn_plugin.torch_versions import is_compiling


def _forward(momentum: float | Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """The kernels, or inside torch.compile the operator that stands for them."""
    *tensors, training, settings, selected = arguments
    normalizers, num_groups, correction, eps = settings
    if not is_compiling():
        return triton.forward(
            *tensors, momentum, training, normalizers, num_groups, correction, eps, selected
        )
    # Not before: to register a custom operator imports Triton.
    from ssn_plugin.ops.switchable_norm.triton import custom_ops

    number, tensor = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
    return custom_ops.switchable_norm_forward(
        *tensors, number, tensor, training, normalizers, num_groups, correction, eps, *selected
    )


def _backward(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, ctx, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    normalizers, num_groups, correction, eps = ctx.settings
    arguments = (dy, x, saved, weight, ctx.ratio_map, ctx.constant)
    arguments += (normalizers, num_groups, correction, eps)
    if not is_compiling():
        return triton.backward(*arguments, ctx.selected, *wanted)
    from ssn_plugin.ops.switchable_norm.triton import custom_ops

    return custom_ops.switchable_norm_backward(*arguments, *ctx.selected, *wanted)


class FusedSwitchableNormFunction(torch.autograd.Function):
    """Forward and backward in Triton, of a non-empty x; see ``ops.switchable_norm``."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        mean_control: Tensor,
        var_control: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
        ratio_map: str,
        selection: tuple[Tensor, ...] | None,
        selected: tuple[int | None, int | None],
        settings: Settings,
    ) -> Tensor:
        """Normalise.

        Args:
            ctx: Autograd context.
            x: Shape (N, C, ...), not empty.
            mean_control: Control parameters of the means, or their ratios, shape (K,).
            var_control: The same of the variances.
            weight: Shape (C,) or None.
            bias: Shape (C,) or None.
            running_mean: Shape (C,) or None.
            running_var: Shape (C,) or None.
            training: Whether 'BN' uses the statistics of the batch.
            momentum: Weight of the new value.
            ratio_map: 'sparsestmax', 'softmax', or 'given' for ratios.
            selection: The tensors of a ``Selection``, or None.
            selected: Candidates that the host knows to be frozen.
            settings: What else the layer is.

        Returns:
            y in the dtype and memory format of x.
        """
        y, saved = _forward(
            momentum,
            x,
            mean_control,
            var_control,
            ratio_map,
            *(selection or (None,) * 5),
            weight,
            bias,
            running_mean,
            running_var,
            training,
            settings,
            selected,
        )
        ctx.save_for_backward(x, mean_control, var_control, weight, saved)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.constant = running_mean is not None and not training
        ctx.ratio_map, ctx.selected, ctx.settings = ratio_map, selected, settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, both control parameters, weight and bias.

        Args:
            ctx: Autograd context.
            dy: The shape of x.

        Returns:
            One entry per argument of the forward pass.
        """
        x, mean_control, var_control, weight, saved = ctx.saved_tensors
        needs_dx, needs_mean, needs_var, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx, dmean, dvar, dweight, dbias = _backward(
            dy, x, saved, weight, ctx, [needs_dx, needs_mean or needs_var, needs_bias, needs_weight]
        )
        return (
            dx if needs_dx else None,
            dmean.to(mean_control.dtype) if needs_mean else None,
            dvar.to(var_control.dtype) if needs_var else None,
            dweight.to(weight.dtype) if needs_weight else None,
            dbias.to(ctx.bias_dtype) if needs_bias else None,
            *(None,) * 8,
        )
