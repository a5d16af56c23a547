"""The autograd function of the Triton backend: all of a layer in one forward and one backward."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ssn_plugin.ops.switchable_norm.collectives import refuse_second_derivatives
from ssn_plugin.ops.switchable_norm.exportable import differentiable_gradients
from ssn_plugin.ops.switchable_norm.ratios import Control, ratio_tensors
from ssn_plugin.ops.switchable_norm.statistics import BatchStatistics, Moments, Settings
from ssn_plugin.ops.switchable_norm.triton import launch as triton
from ssn_plugin.torch_versions import is_compiling

# What is no argument of its own of the autograd function: a plain tuple, made ten times as fast.
_Call = tuple[Control, BatchStatistics, Settings, ProcessGroup | None]
_NO_SELECTION = (None,) * 5


def _forward(
    call: _Call, x: Tensor, controls: tuple, vectors: tuple
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernels, or inside torch.compile the operator that stands for them."""
    (_, _, ratio_map, selection, selected), (_, given, momentum), settings, group = call
    tensors = (x, *controls, ratio_map, *(selection or _NO_SELECTION), *vectors)
    training = given is None
    if not is_compiling():
        return triton.forward(*tensors, momentum, training, *settings, selected, group)
    # Not before: to register a custom operator imports Triton.
    from ssn_plugin.ops.switchable_norm.triton import custom_ops

    number, tensor = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
    y, saved = custom_ops.switchable_norm_forward(
        *tensors, number, tensor, training, *settings, *selected
    )
    return y, saved, None


def _in_dtype(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    # Tensor.to takes its time even where it has nothing to do, and all are float32.
    return gradient if dtype is torch.float32 else gradient.to(dtype)


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
        call: _Call,
    ) -> Tensor:
        """y in the dtype and memory format of x.

        Control parameters may be None where both choices are known. ``call`` says where the ratios
        come from, what 'BN' does with running statistics, what else the layer is, and the
        processes whose rows all count for 'BN'.
        """
        vectors = (weight, bias, running_mean, running_var)
        y, saved, count = _forward(call, x, (mean_control, var_control), vectors)
        control, batch, settings, group = call
        # Control parameters of a decided statistic are not read, so whoever writes to them between
        # forward and backward does no harm.
        mean_known, var_known = control.known
        ctx.save_for_backward(
            x,
            weight,
            saved,
            count,
            mean_control if mean_known is None else None,
            var_control if var_known is None else None,
            *(batch.given or ()),
        )
        dtypes = [t if t is None else t.dtype for t in (mean_control, var_control, bias)]
        rule = control.ratio_map, control.selection, control.known
        ctx.state = *rule, batch.given is not None, settings, group, dtypes
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, both control parameters, weight and bias, and None for the others."""
        if torch.is_grad_enabled() and not is_compiling():
            return _gradients_to_differentiate(ctx, dy)
        x, weight, saved, count, *_ = ctx.saved_tensors
        needs_dx, needs_mean, needs_var, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        ratio_map, _, selected, constant, settings, group, (of_mean, of_var, of_bias) = ctx.state
        arguments = (dy, x, saved, weight, ratio_map, constant, *settings)
        wanted = (needs_dx, needs_mean or needs_var, needs_bias, needs_weight)
        if not is_compiling():
            found = triton.backward(*arguments, selected, *wanted, count, group)
        else:
            from ssn_plugin.ops.switchable_norm.triton import custom_ops

            found = custom_ops.switchable_norm_backward(*arguments, *selected, *wanted)
        dx, dmean, dvar, dweight, dbias = found
        return (
            dx if needs_dx else None,
            _in_dtype(dmean, of_mean) if needs_mean else None,
            _in_dtype(dvar, of_var) if needs_var else None,
            _in_dtype(dweight, weight.dtype) if needs_weight else None,
            _in_dtype(dbias, of_bias) if needs_bias else None,
            None,
            None,
            None,
        )


# Without the look for tensors of torch.func: that takes as long as an operator on a small tensor.
apply = super(torch.autograd.Function, FusedSwitchableNormFunction).apply


def _gradients_to_differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The same by plain operators, for ``create_graph=True``."""
    ratio_map, selection, selected, constant, settings, group, dtypes = ctx.state
    if group is not None:
        refuse_second_derivatives()
    x, weight, _, _, mean_control, var_control, *given = ctx.saved_tensors
    size = len(settings.normalizers)
    values = [
        None if choice is None else [float(k == choice) for k in range(size)] for choice in selected
    ]
    if None in values:
        # A decided statistic beside an undecided one: any vector stands for its parameters.
        filler = torch.zeros(size, device=x.device)
        controls = [filler if c is None else c for c in (mean_control, var_control)]
        tensors = ratio_tensors(Control(*controls, ratio_map, selection))
        values = [v or t.unbind() for v, t in zip(values, tensors, strict=True)]
    gradients = differentiable_gradients(
        dy,
        x,
        (mean_control, var_control),
        tuple(values),
        weight,
        Moments(*given) if constant else None,
        settings,
        ctx.needs_input_grad[:5],
        [dict(dtype=dtype, device=x.device) for dtype in dtypes],
    )
    return *gradients, None, None, None
