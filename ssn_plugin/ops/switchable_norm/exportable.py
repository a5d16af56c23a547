"""The layer in a few plain operators: for export and tracing, and for second derivatives.

Recorders see neither through the autograd functions nor through their choice of ATen operators. No
value and no size is read here, so what is recorded holds for every input size; and autograd can
differentiate what is here as often as it likes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssn_plugin.ops.switchable_norm.statistics import Moments, Settings

Values = Sequence[float | Tensor]


def switchable_norm(
    x: Tensor,
    mean_ratios: Values,
    var_ratios: Values,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Moments | None,
    settings: Settings,
) -> Tensor:
    """Normalise by importance ratios; a candidate whose ratio is the number 0 is left out.

    Args:
        x: Shape (N, C, ...).
        mean_ratios: K numbers or 0-d tensors.
        var_ratios: K numbers or 0-d tensors.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        given: What stands for the statistics of 'BN', (C,) each; None for those of the batch.
        settings: What else the layer is.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # (N, C, S), so that one set of operators serves every number of dimensions.
    rows = (x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)).to(dtype)
    ratios = list(zip(settings.normalizers, mean_ratios, var_ratios, strict=True))
    from_rows = [
        name
        for name, *pair in ratios
        if any(map(_takes_part, pair)) and not (name == 'BN' and given is not None)
    ]
    moments = _row_moments(rows, settings.correction) if from_rows else None
    mean, var = 0.0, settings.eps
    for name, mean_ratio, var_ratio in ratios:
        if _takes_part(mean_ratio) or _takes_part(var_ratio):
            found = given if name not in from_rows else _pooled(moments, name, settings)
            mean = mean + mean_ratio * found.mean.to(dtype) if _takes_part(mean_ratio) else mean
            var = var + var_ratio * found.var.to(dtype) if _takes_part(var_ratio) else var
    # Not the weight times 1 / sqrt: ONNX Runtime's fusion of these two loses weights that several
    # layers or several calls share.
    scale = torch.rsqrt(var) if weight is None else weight.to(dtype) / var.sqrt()
    y = (rows - mean.unsqueeze(-1)) * scale.unsqueeze(-1)
    y = y if bias is None else y + bias.to(dtype).unsqueeze(-1)
    return y.to(x.dtype).reshape(x.shape)


def differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    sources: tuple[Tensor | None, Tensor | None],
    ratios: tuple[Values, Values],
    weight: Tensor | None,
    given: Moments | None,
    settings: Settings,
    wanted: Sequence[bool],
    factories: Sequence[dict | None],
) -> list[Tensor | None]:
    """Gradients of the layer that can be differentiated again.

    Args:
        dy: Gradient of y.
        x: As in the forward pass, like all that is not mentioned.
        sources: The tensors that the ratios of means and variances were computed from, if any.
        ratios: Computed from them again.
        weight: Shape (C,) or None.
        given: As for :func:`switchable_norm`.
        settings: What else the layer is.
        wanted: Of x, both sources, weight and bias, which gradients are wanted.
        factories: Dtype and device of the control parameters of mean and variance, and of bias.

    Returns:
        The gradients in this order, None where one is not wanted. Control parameters that were not
        read have a gradient of zero.
    """
    y = switchable_norm(x, *ratios, weight, None, given, settings)
    inputs = [
        tensor if needed and tensor is not None and tensor.requires_grad else None
        for tensor, needed in zip((x, *sources, weight), wanted[:4], strict=True)
    ]
    present = [tensor for tensor in inputs if tensor is not None]
    found = iter(
        torch.autograd.grad(y, present, dy, create_graph=True, allow_unused=True) if present else ()
    )
    dx, *controls, dweight = [None if tensor is None else next(found) for tensor in inputs]
    controls = [
        torch.zeros(len(settings.normalizers), **factory) if needed and d is None else d
        for d, needed, factory in zip(controls, wanted[1:3], factories[:2], strict=True)
    ]
    dbias = dy.sum([0, *range(2, dy.dim())]).to(**factories[2]) if wanted[4] else None
    return [dx, *controls, dweight, dbias]


def factory_of(tensor: Tensor | None) -> dict | None:
    """Dtype and device of a tensor."""
    return None if tensor is None else dict(dtype=tensor.dtype, device=tensor.device)


def _takes_part(ratio: float | Tensor) -> bool:
    return isinstance(ratio, Tensor) or ratio != 0


def _row_moments(rows: Tensor, correction: int) -> Moments:
    mean = rows.mean(-1)
    var = (rows - mean.unsqueeze(-1)).square().mean(-1)
    if correction:
        # As a tensor, for the length may be known only when the recorded network runs.
        length = torch.ones_like(rows[0, 0]).sum()
        var = var * (length / (length - 1).clamp(min=1))
    return Moments(mean, var)


def _pooled(moments: Moments, normalizer: str, settings: Settings) -> Moments:
    """Moments of one normalizer by the law of total variance, broadcasting to (N, C)."""
    if normalizer == 'IN':
        return moments
    if normalizer == 'GN':
        # Not by unflatten: it needs ONNX opset 13, and mmdeploy's default is 11.
        shape = (moments.mean.shape[0], settings.num_groups, -1)
        grouped = [value.reshape(shape) for value in moments]
        size = moments.mean.shape[1] // settings.num_groups
        return Moments(
            *(value.expand(-1, -1, size).flatten(1) for value in _total(Moments(*grouped), 2))
        )
    return _total(moments, {'BN': 0, 'LN': 1}[normalizer])


def _total(moments: Moments, dim: int) -> Moments:
    mean = moments.mean.mean(dim, keepdim=True)
    var = (moments.var + (moments.mean - mean).square()).mean(dim, keepdim=True)
    return Moments(mean, var)
