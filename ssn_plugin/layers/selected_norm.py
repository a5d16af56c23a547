"""SelectedNorm: what an SSN is once it has decided for two normalizers."""

import torch
from torch import Tensor, nn

from ssn_plugin.functional import check_layer, groups_of
from ssn_plugin.layers.recomputation import recomputes
from ssn_plugin.ops.switchable_norm.dispatch import switchable_norm
from ssn_plugin.ops.switchable_norm.exportable import switchable_norm as plain_switchable_norm
from ssn_plugin.ops.switchable_norm.ratios import Selection
from ssn_plugin.ops.switchable_norm.statistics import NORMALIZERS, Settings
from ssn_plugin.torch_versions import is_compiling


class SelectedNorm(nn.Module):
    r"""Normalise by the mean of one normalizer and the variance of another, and nothing else.

    .. math::
        y = \frac{x - \mu_{\mathrm{mean\_source}}}
        {\sqrt{\sigma^2_{\mathrm{var\_source}} + \epsilon}} \cdot \mathrm{weight} + \mathrm{bias}

    It computes what a decided SSN computes, without control parameters, radius and flags, and can
    be traced and exported. :func:`ssn_plugin.collapse_ssn` makes it where mean and variance chose
    differently, and where torch has no layer with the variance of ``correction=1``.

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
    ) -> None:
        super().__init__()
        check_layer(num_features, eps, momentum, correction)
        for name, source in (('mean_source', mean_source), ('var_source', var_source)):
            if source not in NORMALIZERS:
                known = ', '.join(NORMALIZERS)
                raise ValueError(f'{name}: got {source!r}, expected one of {known}')
        sources = (mean_source, var_source)
        self.num_features = int(num_features)
        self.mean_source = mean_source
        self.var_source = var_source
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.num_groups = groups_of(num_groups, num_features)
        self.correction = correction
        self.track_running_stats = track_running_stats and 'BN' in sources

        names = tuple(dict.fromkeys(sources))
        self._settings = Settings(names, self.num_groups, correction, eps)
        self._choices = tuple(map(names.index, sources))
        self._ratios = [[float(name == source) for name in names] for source in sources]
        # What a frozen SSN holds, so that its forward pass serves here too. Before those that may
        # be None: torch.export miscounts what follows a buffer of None.
        for statistic, ratios, choice in zip(
            ('mean', 'var'), self._ratios, self._choices, strict=True
        ):
            self.register_buffer(f'_{statistic}_ratios', torch.tensor(ratios), persistent=False)
            self.register_buffer(f'_{statistic}_choice', torch.tensor(choice), persistent=False)
        self.register_buffer('_fixed', torch.tensor(1), persistent=False)
        self.register_buffer('_radius', torch.tensor(1.0), persistent=False)
        for name, value in (('weight', torch.ones), ('bias', torch.zeros)):
            self.register_parameter(name, nn.Parameter(value(num_features)) if affine else None)
        tracked = self.track_running_stats
        self.register_buffer('running_mean', torch.zeros(num_features) if tracked else None)
        self.register_buffer('running_var', torch.ones(num_features) if tracked else None)
        self.register_buffer('num_batches_tracked', torch.tensor(0) if tracked else None)

    def _known(self) -> tuple[int, int]:
        return self._choices

    def _selection(self) -> Selection:
        fixed = self._fixed
        return Selection(
            self._radius, fixed, fixed, self._mean_choice, self._var_choice, self._known
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise.

        Args:
            x: Shape (N, C, ...).

        Returns:
            The shape and dtype of ``x``.

        Raises:
            ValueError: If the number of dimensions or channels is not the layer's, or ``x`` is not
                floating-point.
        """
        running_mean, running_var = self.running_mean, self.running_var
        if not self.training and (is_compiling() or torch.jit.is_tracing()):
            return plain_switchable_norm(
                x,
                *self._ratios,
                self.weight,
                self.bias,
                running_mean,
                running_var,
                self._settings,
            )
        if not 2 <= x.dim() <= 5 or x.shape[1] != self.num_features:
            raise ValueError(
                f'x: got shape {tuple(x.shape)}, expected (N, {self.num_features}, ...)'
            )
        if not x.is_floating_point():
            raise ValueError(f'x: got {x.dtype}, expected a floating-point tensor')
        momentum = self.momentum or 0.0
        if self.training and self.track_running_stats:
            if recomputes():  # as in SwitchableNorm
                running_mean, running_var = running_mean.clone(), running_var.clone()
            else:
                self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = self.num_batches_tracked.to(running_mean.dtype).reciprocal()
        return switchable_norm(
            x,
            self._mean_ratios,
            self._var_ratios,
            self.weight,
            self.bias,
            running_mean,
            running_var,
            self.training,
            momentum,
            'sparsestmax',
            self._selection(),
            self._settings,
        )

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
