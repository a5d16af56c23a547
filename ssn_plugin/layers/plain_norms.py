"""Norms of torch for every input that SSN takes; collapsed layers are these.

torch's own take one number of dimensions each, its InstanceNorm refuses rows of one element, as the
image pooling of DeepLab has them, and its GroupNorm loses digits in ONNX.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssn_plugin.layers.fx_leaf import as_leaf, is_symbolic
from ssn_plugin.ops.switchable_norm.exportable import switchable_norm as plain_switchable_norm
from ssn_plugin.ops.switchable_norm.statistics import Settings
from ssn_plugin.torch_versions import is_compiling

_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _check_dimensions(x: Tensor) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f'x: got shape {tuple(x.shape)}, expected 2-D to 5-D (N, C, ...)')


class BatchNorm(nn.BatchNorm2d):
    """A BatchNorm of torch that learns which one it is from its first input.

    An SSN without a number in its name takes any number of dimensions, so what it becomes cannot be
    known when it collapses. The first input turns this into ``nn.BatchNorm1d``, ``2d`` or ``3d``,
    with the same parameters and buffers; tools that look for these classes find them.

    Arguments are those of ``nn.BatchNorm2d``.

    Example:
        >>> import torch
        >>> from ssn_plugin.layers.plain_norms import BatchNorm
        >>> layer = BatchNorm(8)
        >>> layer(torch.randn(4, 8)).shape
        torch.Size([4, 8])
        >>> type(layer).__name__
        'BatchNorm1d'
    """

    def _check_input_dim(self, x: Tensor) -> None:
        _check_dimensions(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x of shape (N, C, ...)."""
        if is_symbolic(x):
            return as_leaf(self, x)
        if x.dim() in _BATCH_NORMS and not is_compiling():
            self.__class__ = _BATCH_NORMS[x.dim()]
        return nn.BatchNorm2d.forward(self, x)


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that is exact in ONNX too.

    torch's exporters write it as an InstanceNormalization, whose result over 4 million elements is
    off by 3e-3 in ONNX Runtime; in plain operators it is right to 1e-5.

    Example:
        >>> import torch
        >>> from ssn_plugin.layers.plain_norms import GroupNorm
        >>> GroupNorm(2, 8)(torch.randn(4, 8, 3, 3)).shape
        torch.Size([4, 8, 3, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every group of channels of a sample, for x of shape (N, C, ...)."""
        if is_symbolic(x):
            return as_leaf(self, x)
        if torch.onnx.is_in_onnx_export():
            name = 'LN' if self.num_groups == 1 else 'GN'
            settings = Settings((name,), self.num_groups, 0, self.eps)
            return plain_switchable_norm(x, [1.0], [1.0], self.weight, self.bias, None, settings)
        return super().forward(x)


class _RowNorm:
    """What makes torch's InstanceNorm that of SSN.

    A row of one element is its own mean, so nothing but the bias is left of it. All other rows go
    through group norm with a group per channel, which on a CPU takes about half the time of
    ``F.instance_norm``.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        _check_dimensions(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every (sample, channel) row of x, (N, C, ...)."""
        if is_symbolic(x):
            return as_leaf(self, x)
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
        # contiguous(), because on channels_last F.group_norm computes the variance as
        # E[x^2] - E[x]^2, which loses digits where the mean is large.
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
