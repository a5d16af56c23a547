"""The normalisation from the control parameters on, and the choice of who computes it.

One autograd function covers importance ratios, statistics, normalisation and the update of the
running statistics. For backward x, weight and O(N * C) numbers are kept, less where that is much
beside x. README.md beside this file has the derivation.

The environment variable ``SSN_BACKEND``, read when this is imported, overrules the choice: 'eager'
for ATen, 'triton' for the kernels, on the CPU with ``TRITON_INTERPRET=1``.
"""

import logging
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ssn_plugin.ops.switchable_norm import aten as eager
from ssn_plugin.ops.switchable_norm import native
from ssn_plugin.ops.switchable_norm.collectives import EmptyShareFunction
from ssn_plugin.ops.switchable_norm.ratios import (
    Ratios,
    Selection,
    control_gradient,
    host_ratios,
    importance_ratios,
    readable,
    unknown_ratios,
)
from ssn_plugin.ops.switchable_norm.statistics import Settings, takes_part
from ssn_plugin.torch_versions import is_compiling

_BACKEND = os.environ.get('SSN_BACKEND', '')
if _BACKEND not in ('', 'eager', 'triton'):
    raise ValueError(f"SSN_BACKEND: got {_BACKEND!r}, expected 'eager' or 'triton'")


@cache
def _say_that_triton_is_missing() -> None:
    logging.getLogger(__name__).warning(
        'Triton is not installed: SSN and SN run on ATen operators on the GPU, which is slower'
    )


def _fused_function(x: Tensor) -> type[torch.autograd.Function] | None:
    """The autograd function of the Triton backend, if that takes ``x``."""
    if _BACKEND == 'eager' or not (x.is_cuda or _BACKEND):
        return None
    # Not before: what helps it inside torch.compile imports Triton.
    from ssn_plugin.ops.switchable_norm.triton import function as fused

    if _BACKEND:
        return None if x.dtype == torch.float64 else fused.FusedSwitchableNormFunction
    if not fused.triton.is_available() and not is_compiling():
        _say_that_triton_is_missing()
    return fused.FusedSwitchableNormFunction if fused.triton.supports(x) else None


class Plan(NamedTuple):
    """What the host knows of one call.

    Attributes:
        mean: Ratios of the means.
        var: Ratios of the variances.
        settings: Of the layer.
        tracks: Whether the running statistics are updated.
        kind: How ATen does it, where mean and variance are those of one normalizer.
        group: Processes whose rows all count for 'BN'.
    """

    mean: Ratios
    var: Ratios
    settings: Settings
    tracks: bool
    kind: native.Native | None
    group: ProcessGroup | None = None


def switchable_norm(
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
    selection: Selection | None,
    settings: Settings,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Normalise, and update the running statistics; arguments are taken as valid.

    Args:
        x: Shape (N, C, ...). An empty x comes back empty.
        mean_control: Control parameters of the means, shape (K,), or the ratios themselves.
        var_control: The same of the variances.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        running_mean: Shape (C,) or None. Updated in place if ``training``, unless another than 'BN'
            is frozen as the choice of mean and variance; else used as a constant.
        running_var: Shape (C,) or None.
        training: Whether 'BN' uses the statistics of the batch.
        momentum: Weight of the new value, a number or a 0-d tensor.
        ratio_map: 'sparsestmax', 'softmax', or 'given' for ratios.
        selection: What SparsestMax needs; None for the other maps.
        settings: What else the layer is.
        group: Processes over whose batches together 'BN' takes its statistics, in training. All of
            them must come here, with an empty x too.
    """
    ratios = None
    if group is not None:
        ratios = host_ratios(mean_control, var_control, ratio_map, selection)
        group = group if _needs_batch(*ratios, settings) else None
    if x.numel() == 0 and group is None:
        return _empty_result(x, mean_control, var_control, weight, bias)
    if 'BN' not in settings.normalizers:
        running_mean = running_var = None
    fused = None if group is not None else _fused_function(x)
    if fused is not None:
        return fused.apply(
            x,
            mean_control,
            var_control,
            weight,
            bias,
            running_mean,
            running_var,
            training,
            momentum,
            ratio_map,
            None if selection is None else selection[:5],
            (None, None) if selection is None else selection.known(),
            settings,
        )
    mean, var = ratios or host_ratios(mean_control, var_control, ratio_map, selection)
    if mean is None or var is None:
        mean_ratios, var_ratios = mean_control, var_control
        if ratio_map != 'given':
            mean_ratios, var_ratios = importance_ratios(mean_control, var_control, selection)
        if mean is None:
            mean_control, mean = mean_ratios, unknown_ratios(mean_ratios, ratio_map != 'given')
        if var is None:
            var_control, var = var_ratios, unknown_ratios(var_ratios, ratio_map != 'given')
    if isinstance(momentum, Tensor) and readable(momentum):
        momentum = momentum.item()

    choice, kind = _only_choice(mean, var, settings), None
    tracks = running_mean is not None and training and _needs_batch(mean, var, settings)
    alone = not tracks or (choice == 'BN' and not isinstance(momentum, Tensor))
    if choice is not None and alone and group is None:  # no operator of ATen shares statistics
        constant = running_mean is not None and not training
        kind = native.kind_of(x, choice, settings, constant)
    if training and not tracks:
        running_mean = running_var = None
    if x.numel() == 0:
        shares_gradients = takes_part('BN', mean, var, settings)
        x = EmptyShareFunction.apply(
            x, running_mean, running_var, momentum, settings.correction, group, shares_gradients
        )
        return _empty_result(x, mean_control, var_control, weight, bias)
    plan = Plan(mean, var, settings, tracks, kind, group)
    return SwitchableNormFunction.apply(
        x, mean_control, var_control, weight, bias, running_mean, running_var, momentum, plan
    )


def _needs_batch(mean: Ratios | None, var: Ratios | None, settings: Settings) -> bool:
    """Whether anybody needs the statistics of 'BN', now or for evaluation."""
    if mean is None or var is None or not (mean.frozen and var.frozen):
        return 'BN' in settings.normalizers
    return takes_part('BN', mean, var, settings)


def _only_choice(mean: Ratios, var: Ratios, settings: Settings) -> str | None:
    """The normalizer whose statistics are those of the layer, if it is one."""
    if len(mean.active) != 1 or len(var.active) != 1 or mean.active[0] != var.active[0]:
        return None
    k = mean.active[0]
    return settings.normalizers[k] if mean.values[k] == var.values[k] == 1 else None


def _empty_result(x: Tensor, *parameters: Tensor | None) -> Tensor:
    """``x`` itself, with every parameter in its graph at gradient zero, as BatchNorm returns it.

    DistributedDataParallel would otherwise meet unused parameters on ranks without proposals.
    """
    touched = sum(p.to(x.dtype).sum() * 0 for p in parameters if p is not None)
    return x + touched


class SwitchableNormFunction(torch.autograd.Function):
    """Forward and backward on ATen, of a non-empty x; see :func:`switchable_norm`."""

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
        momentum: float | Tensor,
        plan: Plan,
    ) -> Tensor:
        """Normalise.

        Args:
            ctx: Autograd context.
            x: Shape (N, C, ...), not empty.
            mean_control: Where ``plan.mean`` comes from, shape (K,); its values where it has none.
            var_control: The same for ``plan.var``.
            weight: Shape (C,) or None.
            bias: Shape (C,) or None.
            running_mean: Shape (C,) or None. If ``plan.tracks`` it is updated in place; otherwise
                it stands for the mean of 'BN'.
            running_var: Shape (C,) or None.
            momentum: Weight of the new value.
            plan: All else.

        Returns:
            y in the dtype of x.
        """
        mean, var, settings, tracks, kind, group = plan
        batch = found = None
        if kind is not None:
            found = native.forward(
                kind, x, weight, bias, running_mean, running_var, momentum, settings.eps
            )
        if found is None:
            if kind is not None:
                # Too large for ATen's float32. The running statistics are updated already.
                plan = plan._replace(kind=None)
                if tracks:
                    running_mean, running_var, tracks = None, None, False
            y, kept, batch = eager.forward(
                x,
                mean.filled(mean_control, x),
                var.filled(var_control, x),
                weight,
                bias,
                running_mean,
                running_var,
                tracks,
                momentum,
                settings,
                group,
            )
        else:
            y, kept = found
        if tracks:
            running_mean = running_var = None
        count = None
        if batch is not None:
            count, running_mean, running_var = batch
        ctx.plan = plan
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Control parameters have a few elements: kept for their dtype and device at least.
        ctx.save_for_backward(
            x, mean_control, var_control, weight, running_mean, running_var, count, *kept
        )
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
        x, mean_control, var_control, weight, *statistics = ctx.saved_tensors
        running_mean, running_var, count, *kept = statistics
        needs_dx, needs_mean, needs_var, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        mean, var, settings, _, kind, group = ctx.plan
        if kind is None:
            dx, dmean, dvar, dweight, dbias = eager.backward(
                dy,
                x,
                mean.filled(mean_control, x),
                var.filled(var_control, x),
                weight,
                running_mean,
                running_var,
                settings,
                kept,
                needs_dx,
                count,
                group,
            )
        else:
            dmean = dvar = {}
            wanted = [needs_dx, needs_weight, needs_bias]
            dx, dweight, dbias = native.backward(
                kind, dy, x, weight, running_mean, running_var, settings.eps, kept, wanted
            )
        return (
            dx,
            control_gradient(mean, dmean, mean_control) if needs_mean else None,
            control_gradient(var, dvar, var_control) if needs_var else None,
            dweight.to(weight.dtype) if needs_weight else None,
            dbias.to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
            None,
            None,
        )
