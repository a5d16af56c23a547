"""The evaluation pass in a few plain operators, for whoever records a network: export and tracing.

Recorders see neither through the autograd functions nor through their choice of ATen operators. No
value and no size is read on the host here, so what is recorded holds for every input size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssn_plugin.ops.switchable_norm.statistics import Moments, Settings


def switchable_norm(
    x: Tensor,
    mean_ratios: Sequence[float],
    var_ratios: Sequence[float],
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Normalise with constant importance ratios; only what they need is computed.

    Args:
        x: Shape (N, C, ...).
        mean_ratios: K numbers.
        var_ratios: K numbers.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        running_mean: Shape (C,) or None for the mean of the batch as that of 'BN'.
        running_var: Shape (C,) or None.
        settings: What else the layer is.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # (N, C, S), so that one set of operators serves every number of dimensions.
    rows = (x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)).to(dtype)
    running = None if running_mean is None else Moments(running_mean, running_var)
    from_rows = [
        name
        for name, *ratios in zip(settings.normalizers, mean_ratios, var_ratios, strict=True)
        if any(ratios) and not (name == 'BN' and running is not None)
    ]
    moments = _row_moments(rows, settings.correction) if from_rows else None
    mean, var = 0.0, settings.eps
    for name, mean_ratio, var_ratio in zip(
        settings.normalizers, mean_ratios, var_ratios, strict=True
    ):
        if mean_ratio or var_ratio:
            found = running if name not in from_rows else _pooled(moments, name, settings)
            mean = mean + mean_ratio * found.mean.to(dtype) if mean_ratio else mean
            var = var + var_ratio * found.var.to(dtype) if var_ratio else var
    scale = torch.rsqrt(var)
    scale = scale if weight is None else scale * weight.to(dtype)
    y = (rows - mean.unsqueeze(-1)) * scale.unsqueeze(-1)
    y = y if bias is None else y + bias.to(dtype).unsqueeze(-1)
    return y.to(x.dtype).reshape(x.shape)


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
        grouped = [value.unflatten(1, (settings.num_groups, -1)) for value in moments]
        size = moments.mean.shape[1] // settings.num_groups
        return Moments(
            *(value.expand(-1, -1, size).flatten(1) for value in _total(Moments(*grouped), 2))
        )
    return _total(moments, {'BN': 0, 'LN': 1}[normalizer])


def _total(moments: Moments, dim: int) -> Moments:
    mean = moments.mean.mean(dim, keepdim=True)
    var = (moments.var + (moments.mean - mean).square()).mean(dim, keepdim=True)
    return Moments(mean, var)
