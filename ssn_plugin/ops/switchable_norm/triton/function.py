"""The autograd function of the Triton backend: all of a layer in one forward and one backward."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ssn_plugin.ops.switchable_norm.collectives import refuse_second_derivatives
from ssn_plugin.ops.switchable_norm.exportable import differentiable_gradients, factory_of
from ssn_plugin.ops.switchable_norm.ratios import Choices, Control, Selection, ratio_tensors
from ssn_plugin.ops.switchable_norm.statistics import Moments, Settings
from ssn_plugin.ops.switchable_norm.triton import launch as triton
from ssn_plugin.torch_versions import is_compiling


def _forward(
    momentum: float | Tensor, group: ProcessGroup | None, *arguments
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernels, or inside torch.compile the operator that stands for them."""
    *tensors, training, settings, selected = arguments
    normalizers, num_groups, correction, eps = settings
    if not is_compiling():
        return triton.forward(
            *tensors, momentum, training, normalizers, num_groups, correction, eps, selected, group
        )
    # Not before: to register a custom operator imports Triton.
    from ssn_plugin.ops.switchable_norm.triton import custom_ops

    number, tensor = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
    y, saved = custom_ops.switchable_norm_forward(
        *tensors, number, tensor, training, normalizers, num_groups, correction, eps, *selected
    )
    return y, saved, None


def _backward(
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    count: Tensor | None,
    ctx,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    normalizers, num_groups, correction, eps = ctx.settings
    arguments = (dy, x, saved, weight, ctx.ratio_map, ctx.constant)
    arguments += (normalizers, num_groups, correction, eps)
    if not is_compiling():
        return triton.backward(*arguments, ctx.selected, *wanted, count, ctx.group)
    from ssn_plugin.ops.switchable_norm.triton import custom_ops

    return custom_ops.switchable_norm_backward(*arguments, *ctx.selected, *wanted)


class FusedSwitchableNormFunction(torch.autograd.Function):
    """Forward and backward in Triton, of a non-empty x; see ``ops.switchable_norm``."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        mean_control: Tensor | None,
        var_control: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
        ratio_map: str,
        selection: Selection | None,
        selected: Choices,
        settings: Settings,
        group: ProcessGroup | None,
    ) -> Tensor:
        """Normalise.

        Args:
            ctx: Autograd context.
            x: Shape (N, C, ...), not empty.
            mean_control: Control parameters of the means, or their ratios, shape (K,). None where
                both choices are known.
            var_control: The same of the variances.
            weight: Shape (C,) or None.
            bias: Shape (C,) or None.
            running_mean: Shape (C,) or None.
            running_var: Shape (C,) or None.
            training: Whether 'BN' uses the statistics of the batch.
            momentum: Weight of the new value.
            ratio_map: 'sparsestmax', 'softmax', or 'given' for ratios.
            selection: What SparsestMax needs; None for the other maps.
            selected: The choices that are known without reading a tensor.
            settings: What else the layer is.
            group: Processes whose rows all count for 'BN'.

        Returns:
            y in the dtype and memory format of x.
        """
        y, saved, count = _forward(
            momentum,
            group,
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
        ctx.constant = running_mean is not None and not training
        given = (running_mean, running_var) if ctx.constant else (None, None)
        # Control parameters of a decided statistic are not read, so whoever writes to them between
        # forward and backward does no harm.
        controls = [
            control if choice is None else None
            for control, choice in zip((mean_control, var_control), selected, strict=True)
        ]
        ctx.save_for_backward(x, *controls, weight, saved, count, *given)
        ctx.factories = [factory_of(tensor) for tensor in (mean_control, var_control, bias)]
        ctx.ratio_map, ctx.selected, ctx.settings = ratio_map, selected, settings
        ctx.selection, ctx.group = selection, group
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, both control parameters, weight and bias.

        Args:
            ctx: Autograd context.
            dy: The shape of x.

        Returns:
            One entry per argument of the forward pass.
        """
        if torch.is_grad_enabled() and not is_compiling():
            return _gradients_to_differentiate(ctx, dy)
        x, _, _, weight, saved, count, *_ = ctx.saved_tensors
        needs_dx, needs_mean, needs_var, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        wanted = [needs_dx, needs_mean or needs_var, needs_bias, needs_weight]
        dx, dmean, dvar, dweight, dbias = _backward(dy, x, saved, weight, count, ctx, wanted)
        of_mean, of_var, of_bias = ctx.factories
        return (
            dx if needs_dx else None,
            dmean.to(**of_mean) if needs_mean else None,
            dvar.to(**of_var) if needs_var else None,
            dweight.to(weight.dtype) if needs_weight else None,
            dbias.to(**of_bias) if needs_bias else None,
            *(None,) * 9,
        )


def _gradients_to_differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The same by plain operators, for ``create_graph=True``."""
    if ctx.group is not None:
        refuse_second_derivatives()
    x, mean_control, var_control, weight, _, _, *given = ctx.saved_tensors
    size = len(ctx.settings.normalizers)
    values = [
        None if choice is None else [float(k == choice) for k in range(size)]
        for choice in ctx.selected
    ]
    if None in values:
        # A decided statistic beside an undecided one: any vector stands for its parameters.
        filler = torch.zeros(size, device=x.device)
        controls = [filler if c is None else c for c in (mean_control, var_control)]
        tensors = ratio_tensors(Control(*controls, ctx.ratio_map, ctx.selection))
        values = [v or t.unbind() for v, t in zip(values, tensors, strict=True)]
    gradients = differentiable_gradients(
        dy,
        x,
        (mean_control, var_control),
        tuple(values),
        weight,
        Moments(*given) if ctx.constant else None,
        ctx.settings,
        ctx.needs_input_grad[:5],
        ctx.factories,
    )
    return *gradients, *(None,) * 9
