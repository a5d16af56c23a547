"""The normalisation from the control parameters on, and the choice of who computes it.

One autograd function covers importance ratios, statistics, normalisation and the update of the
running statistics; one for the ratios and one for the rest would cost a small layer a fifth of its
time. For backward x, weight and O(N * C) numbers are saved, less where that is much beside x.
README.md in ops/ has the derivation.

The environment variable ``SSN_BACKEND``, read when this is imported, overrules the choice: 'eager'
for ATen, 'triton' for the kernels, on the CPU with ``TRITON_INTERPRET=1``.
"""

import logging
import os
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ssn_plugin.ops.switchable_norm import aten, native
from ssn_plugin.ops.switchable_norm.collectives import (
    BatchMoments,
    EmptyShareFunction,
    refuse_second_derivatives,
)
from ssn_plugin.ops.switchable_norm.exportable import differentiable_gradients, factory_of
from ssn_plugin.ops.switchable_norm.ratios import (
    Control,
    Ratios,
    control_gradient,
    ratio_tensors,
    read_ratios,
    readable,
    unread_ratios,
)
from ssn_plugin.ops.switchable_norm.statistics import (
    BatchStatistics,
    Moments,
    Settings,
    takes_part,
)
from ssn_plugin.torch_versions import HAS_CUSTOM_OPS, beside_the_graph, is_compiling

_BACKEND = os.environ.get('SSN_BACKEND', '')
if _BACKEND not in ('', 'eager', 'triton'):
    raise ValueError(f"SSN_BACKEND: got {_BACKEND!r}, expected 'eager' or 'triton'")


@cache
def _say_that_triton_is_missing() -> None:
    old = f'torch {torch.__version__} is too old for the Triton kernels, which need 2.4'
    logging.getLogger(__name__).warning(
        '%s: SSN and SN run on ATen operators on the GPU, which is slower',
        'Triton is not installed' if HAS_CUSTOM_OPS else old,
    )


def _triton() -> ModuleType:
    # Not before it is needed: what helps it inside torch.compile imports Triton.
    from ssn_plugin.ops.switchable_norm.triton import function

    return function


_triton_once = cache(_triton)  # torch.compile warns of caches


def _fused(x: Tensor) -> ModuleType | None:
    """The Triton backend, if that takes ``x``."""
    if _BACKEND == 'eager' or not (x.is_cuda or _BACKEND):
        return None
    fused = _triton() if is_compiling() else _triton_once()
    if _BACKEND:
        return None if x.dtype == torch.float64 else fused
    if not fused.triton.is_available() and not is_compiling():
        _say_that_triton_is_missing()
    return fused if fused.triton.supports(x) else None


class Call(NamedTuple):
    """What is settled before the autograd function runs.

    Attributes:
        mean: Ratios of the means.
        var: Ratios of the variances.
        momentum: Weight of the new value in tracked running statistics.
        settings: Of the layer.
        operator: The ATen operator that does it, where mean and variance are of one normalizer.
        group: Processes whose rows all count for 'BN'.
    """

    mean: Ratios
    var: Ratios
    momentum: float | Tensor
    settings: Settings
    operator: native.Native | None
    group: ProcessGroup | None


@beside_the_graph
def switchable_norm(
    x: Tensor,
    control: Control,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: BatchStatistics,
    settings: Settings,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Normalise, and update the tracked running statistics; arguments are taken as valid.

    Args:
        x: Shape (N, C, ...). An empty x comes back empty.
        control: Where the importance ratios come from.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        batch: Of the layer. Running statistics of 'BN' are left alone where mean and variance are
            decided for others.
        settings: What else the layer is.
        group: Processes over whose batches together 'BN' takes its statistics, in training. All of
            them must come here, with an empty x too.
    """
    size = len(settings.normalizers)
    if 'BN' not in settings.normalizers:
        batch = BatchStatistics()
    ratios = None
    if group is not None:
        ratios = read_ratios(control, size)
        group = group if _needs_batch(*ratios, settings) else None
    if x.numel() == 0 and group is None:
        return _empty_result(x, control.mean, control.var, weight, bias)
    fused = None
    if x.numel() and not (group is not None and is_compiling()):
        fused = _fused(x)
    if fused is not None:
        running_mean, running_var = batch.tracked or batch.given or (None, None)
        if group is None and _is_batch_norm(x, control, weight, batch, settings):
            training = batch.given is None
            y = torch.nn.functional.batch_norm(
                x, running_mean, running_var, weight, bias, training, batch.momentum, settings.eps
            )
            return y if control.mean is None else UnreadFunction.apply(y, *control[:2])
        plain = not (is_compiling() or torch._C._are_functorch_transforms_active())
        apply = fused.apply if plain else fused.FusedSwitchableNormFunction.apply
        return apply(
            x,
            control.mean,
            control.var,
            weight,
            bias,
            running_mean,
            running_var,
            (control, batch, settings, group),
        )
    mean, var = ratios or read_ratios(control, size)
    sources = [control.mean, control.var]
    if mean is None or var is None:
        tensors = ratio_tensors(control)
        on_simplex = control.ratio_map != 'given'
        if mean is None:
            sources[0], mean = tensors[0], unread_ratios(tensors[0], on_simplex)
        if var is None:
            sources[1], var = tensors[1], unread_ratios(tensors[1], on_simplex)
    batch, operator = _settled(x, mean, var, batch, settings)
    if x.numel() == 0:
        shares_gradients = takes_part('BN', mean, var, settings)
        x = EmptyShareFunction.apply(x, batch, settings.correction, group, shares_gradients)
        return _empty_result(x, *sources, weight, bias)
    tracked, given = batch.tracked or (None, None), batch.given or (None, None)
    call = Call(
        mean,
        var,
        batch.momentum,
        settings,
        None if group is not None else operator,  # no ATen operator shares statistics
        group,
    )
    return SwitchableNormFunction.apply(x, *sources, weight, bias, *tracked, *given, call)


def _is_batch_norm(
    x: Tensor,
    control: Control,
    weight: Tensor | None,
    batch: BatchStatistics,
    settings: Settings,
) -> bool:
    """Whether a GPU should run batch norm, which reads x once where it fits on the chip."""
    mean, var = control.known
    if mean is None or mean != var or settings.normalizers[mean] != 'BN' or is_compiling():
        return False
    plain = weight is None or weight.dtype in (x.dtype, torch.float32)
    by_number = not isinstance(batch.momentum, Tensor)
    running = batch.given is not None
    return plain and by_number and native.kind_of(x, 'BN', settings, running) is not None


class UnreadFunction(torch.autograd.Function):
    """Keeps control parameters that nobody reads in the graph of y, with a gradient of zero."""

    @staticmethod
    def forward(ctx, y: Tensor, mean_control: Tensor, var_control: Tensor) -> Tensor:
        """y itself, which nobody else has yet."""
        ctx.mark_dirty(y)  # which lets autograd return it without a copy
        ctx.factories = [(len(z), factory_of(z)) for z in (mean_control, var_control)]
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient passes as it is."""
        return dy, *(torch.zeros(size, **factory) for size, factory in ctx.factories)


def _settled(
    x: Tensor, mean: Ratios, var: Ratios, batch: BatchStatistics, settings: Settings
) -> tuple[BatchStatistics, native.Native | None]:
    """What is left to do with running statistics, and the ATen operator for all of it, if any."""
    if batch.tracked is not None and not _needs_batch(mean, var, settings):
        batch = BatchStatistics()
    momentum = batch.momentum
    if isinstance(momentum, Tensor) and readable(momentum):
        momentum = momentum.item()
        batch = batch._replace(momentum=momentum)
    choice = _only_choice(mean, var, settings)
    by_number = choice == 'BN' and not isinstance(momentum, Tensor)
    if choice is None or x.numel() == 0 or (batch.tracked is not None and not by_number):
        return batch, None
    return batch, native.kind_of(x, choice, settings, batch.given is not None)


def _needs_batch(mean: Ratios | None, var: Ratios | None, settings: Settings) -> bool:
    """Whether anybody needs the statistics of 'BN', now or for evaluation."""
    if mean is None or var is None or not (mean.decided and var.decided):
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
        mean_control: Tensor | None,
        var_control: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        tracked_mean: Tensor | None,
        tracked_var: Tensor | None,
        given_mean: Tensor | None,
        given_var: Tensor | None,
        call: Call,
    ) -> Tensor:
        """y in the dtype of x.

        Control parameters, (K,), are what ``call.mean`` and ``call.var`` come from, or their values
        where those have none. Tracked statistics are updated in place; those given stand for the
        batch's.
        """
        mean, var, momentum, settings, operator, group = call
        tracked = None if tracked_mean is None else Moments(tracked_mean, tracked_var)
        given = None if given_mean is None else Moments(given_mean, given_var)
        batch = BatchStatistics(tracked, given, momentum)
        joined = (None,) * 3
        if operator is not None:
            y, kept = native.forward(operator, x, weight, bias, batch, settings.eps)
        else:
            ratios = mean.filled(mean_control, x), var.filled(var_control, x)
            y, kept, found = aten.forward(x, *ratios, weight, bias, batch, settings, group)
            joined = found or joined
        ctx.call = call
        ctx.sizes = len(settings.normalizers)
        ctx.factories = [factory_of(tensor) for tensor in (mean_control, var_control, bias)]
        # Control parameters of a decided layer are not read, so whoever writes to them between
        # forward and backward does no harm.
        controls = [
            control if ratios.moving else None
            for control, ratios in ((mean_control, mean), (var_control, var))
        ]
        if mean.values is None:
            controls[0] = mean_control
        if var.values is None:
            controls[1] = var_control
        ctx.save_for_backward(x, *controls, weight, given_mean, given_var, *joined, *kept)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, both control parameters, weight and bias, and None for the others."""
        if torch.is_grad_enabled() and not is_compiling():
            return _gradients_to_differentiate(ctx, dy)
        return _gradients(ctx, dy)


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, mean_control, var_control, weight, *statistics = ctx.saved_tensors
    given_mean, given_var, *joined = statistics[:5]
    kept = statistics[5:]
    needs_dx, needs_mean, needs_var, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    mean, var, _, settings, operator, group = ctx.call
    given = None if given_mean is None else Moments(given_mean, given_var)
    if operator is None:
        dx, dmean, dvar, dweight, dbias = aten.backward(
            dy,
            x,
            mean.filled(mean_control, x),
            var.filled(var_control, x),
            weight,
            given,
            settings,
            kept,
            needs_dx,
            None if group is None else BatchMoments(*joined),
            group,
        )
    else:
        dmean = dvar = {}
        wanted = [needs_dx, needs_weight, needs_bias]
        dx, dweight, dbias = native.backward(
            operator, dy, x, weight, given, settings.eps, kept, wanted
        )
    of_mean, of_var, of_bias = ctx.factories
    return (
        dx,
        control_gradient(mean, dmean, ctx.sizes, of_mean) if needs_mean else None,
        control_gradient(var, dvar, ctx.sizes, of_var) if needs_var else None,
        dweight.to(weight.dtype) if needs_weight else None,
        dbias.to(of_bias['dtype']) if needs_bias else None,
        *(None,) * 5,
    )


def _gradients_to_differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The same by plain operators, for ``create_graph=True``."""
    x, mean_control, var_control, weight, given_mean, given_var, *_ = ctx.saved_tensors
    mean, var, _, settings, _, group = ctx.call
    if group is not None:
        refuse_second_derivatives()
    controls = (mean_control, var_control)
    values = []
    for ratios, control in zip((mean, var), controls, strict=True):
        if ratios.values is None:
            values.append(control.unbind())
        else:
            values.append(ratios.again(control).unbind() if ratios.moving else ratios.values)
    given = None if given_mean is None else Moments(given_mean, given_var)
    gradients = differentiable_gradients(
        dy,
        x,
        controls,
        tuple(values),
        weight,
        given,
        settings,
        ctx.needs_input_grad[:5],
        ctx.factories,
    )
    return *gradients, *(None,) * 5
