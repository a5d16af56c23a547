"""BatchNorm and InstanceNorm of torch for every input that SSN takes; collapsed layers are these.

torch's own take one number of dimensions each, and its InstanceNorm refuses rows of one element,
as the image pooling of DeepLab has them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssn_plugin.ops.switchable_norm.exportable import switchable_norm as plain_switchable_norm
from ssn_plugin.ops.switchable_norm.statistics import Settings
from ssn_plugin.torch_versions import is_compiling


def _check_dimensions(x: Tensor) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f'x: got shape {tuple(x.shape)}, expected 2-D to 5-D (N, C, ...)')


class BatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` for (N, C), (N, C, L), (N, C, H, W) and (N, C, D, H, W).

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of the new value in the running statistics.
        affine: Whether to learn ``weight`` and ``bias``.
        track_running_stats: Whether to keep statistics for evaluation.

    Example:
        >>> import torch
        >>> from ssn_plugin.layers.plain_norms import BatchNorm
        >>> BatchNorm(8)(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def _check_input_dim(self, x: Tensor) -> None:
        _check_dimensions(x)


class _RowNorm:
    """What makes torch's InstanceNorm that of SSN.

    A row of one element is its own mean, so nothing but the bias is left of it. All other rows go
    through group norm with a group per channel, which on a CPU takes about half the time of
    ``F.instance_norm``.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        _check_dimensions(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every (sample, channel) row.

        Args:
            x: Shape (N, C, ...).
        """
        self._check_input_dim(x)
        if not self.training and (is_compiling() or torch.jit.is_tracing()):
            # A choice by size would hold for this size alone in what is recorded.
            settings = Settings(('IN',), self.num_features, 0, self.eps)
            ratios = [1.0]
            return plain_switchable_norm(x, ratios, ratios, self.weight, self.bias, None, settings)
        if x.shape[2:].numel() == 1:
            y = x - x
            if self.affine:
                per_channel = (-1, *(1,) * (x.dim() - 2))
                y = y * self.weight.view(per_channel) + self.bias.view(per_channel)
            return y.to(x.dtype)
        # Of channels_last it would take E[x^2] - E[x]^2.
        return F.group_norm(x.contiguous(), self.num_features, self.weight, self.bias, self.eps)


class InstanceNorm1d(_RowNorm, nn.InstanceNorm1d):
    """``nn.InstanceNorm1d`` that takes (N, C) and rows of one element."""


class InstanceNorm2d(_RowNorm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` that takes 2-D to 5-D input and rows of one element.

    Example:
        >>> import torch
        >>> from ssn_plugin.layers.plain_norms import InstanceNorm2d
        >>> float(InstanceNorm2d(8)(torch.randn(2, 8, 1, 1)).abs().max())
        0.0
    """


class InstanceNorm3d(_RowNorm, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` that takes rows of one element."""
