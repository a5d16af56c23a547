"""SelectedNorm: what an SSN is once it has decided for two normalizers."""

import torch

from ssn_plugin.layers.switchable import StatisticsNorm
from ssn_plugin.ops.switchable_norm.ratios import Control
from ssn_plugin.ops.switchable_norm.statistics import NORMALIZERS, Settings
from ssn_plugin.torch_versions import is_compiling


class SelectedNorm(StatisticsNorm):
    r"""Normalise by the mean of one normalizer and the variance of another, and nothing else.

    .. math::
        y = \frac{x - \mu_{\mathrm{mean\_source}}}
        {\sqrt{\sigma^2_{\mathrm{var\_source}} + \epsilon}} \cdot \mathrm{weight} + \mathrm{bias}

    It computes what a decided SSN computes, without control parameters, radius and flags, and can
    be traced and exported. :func:`ssn_plugin.collapse_ssn` makes it where mean and variance
    selected different normalizers, and where torch has no layer with the variance of
    ``correction=1``.

    Args:
        num_features: C, the number of channels of (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W).
        mean_source: 'IN', 'LN', 'BN' or 'GN'.
        var_source: The same for the variance.
        eps: Added to the variance.
        momentum: Weight of the new value in the running statistics; None is the cumulative average.
        affine: Whether to learn ``weight`` and ``bias``.
        track_running_stats: Whether 'BN' keeps running statistics for evaluation.
        num_groups: Groups of 'GN': the largest divisor of C up to it.
        correction: 0 for the paper's variances, 1 for those of the authors' release.
        device: Of parameters and buffers.
        dtype: Of parameters and running statistics.

    Raises:
        ValueError: If an argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> from ssn_plugin import SelectedNorm
        >>> layer = SelectedNorm(8, 'LN', 'BN').eval()
        >>> layer(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
        >>> sorted(layer.state_dict())
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """

    def __init__(
        self,
        num_features: int,
        mean_source: str,
        var_source: str,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        num_groups: int = 32,
        correction: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, num_groups, correction
        )
        for name, source in (('mean_source', mean_source), ('var_source', var_source)):
            if source not in NORMALIZERS:
                known = ', '.join(NORMALIZERS)
                raise ValueError(f'{name}: got {source!r}, expected one of {known}')
        sources = (mean_source, var_source)
        self.mean_source = mean_source
        self.var_source = var_source
        self.track_running_stats = track_running_stats and 'BN' in sources
        self._names = tuple(dict.fromkeys(sources))
        self._choices = tuple(map(self._names.index, sources))
        factory = dict(device=device, dtype=dtype)
        self._add_affine(factory)
        self._add_running_stats(factory)
        self.reset_parameters()

    def _settings(self) -> Settings:
        return Settings(self._names, self.num_groups, self.correction, self.eps)

    def _control(self) -> Control:
        return Control(None, None, 'given', known=self._choices)

    def _constant_ratios(self) -> tuple[list[float], list[float]]:
        return tuple([float(k == c) for k in range(len(self._names))] for c in self._choices)

    def _is_recorded(self) -> bool:
        return is_compiling() or super()._is_recorded()

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        groups = ''
        if 'GN' in (self.mean_source, self.var_source):
            groups = f', num_groups={self.num_groups}'
        return (
            f'{self.num_features}, {self.mean_source!r}, {self.var_source!r}, eps={self.eps}, '
            f'momentum={self.momentum}, affine={self.affine}, '
            f'track_running_stats={self.track_running_stats}{groups}, correction={self.correction}'
        )
