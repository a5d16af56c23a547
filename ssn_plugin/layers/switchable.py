"""What SSN and its parent SN share: parameters, running statistics, input checks, state dict."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssn_plugin.functional import check_layer, check_normalizers, groups_of
from ssn_plugin.layers.recomputation import recomputes
from ssn_plugin.layers.small_batch import warn_of_one_sample
from ssn_plugin.ops.switchable_norm.dispatch import switchable_norm
from ssn_plugin.ops.switchable_norm.ratios import Selection, importance_ratios
from ssn_plugin.ops.switchable_norm.statistics import Settings
from ssn_plugin.torch_versions import is_compiling


class SwitchableNorm(nn.Module):
    """Base of the layers that mix the statistics of several normalizers.

    A subclass says how control parameters become importance ratios: by ``_ratio_map``, and for
    SparsestMax by what :meth:`_selection` returns.

    Args:
        num_features: C, the number of channels.
        eps: Added to the mixed variance.
        momentum: Weight of the new value in the running statistics, or None for the cumulative
            average, as in ``torch.nn.BatchNorm2d``.
        affine: Whether to learn ``weight`` and ``bias``.
        track_running_stats: Whether 'BN' keeps running statistics for evaluation.
        normalizers: Candidates out of 'IN', 'LN', 'BN', 'GN'.
        num_groups: Groups of 'GN': the largest divisor of C up to it.
        correction: 0 for the paper's variances, 1 for those of the authors' release.

    Raises:
        ValueError: If an argument is out of its range; the message names it.
    """

    _version = 1
    _abbr_ = 'sn'  # mmcv names a norm by it: sn1, sn2, ... as in the released files
    _dims: tuple[int, ...] = (2, 3, 4, 5)
    _ratio_map = 'softmax'
    _group = None  # processes over whose batches together 'BN' takes its statistics

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        normalizers: Sequence[str] = ('IN', 'LN', 'BN'),
        num_groups: int = 32,
        correction: int = 0,
    ) -> None:
        super().__init__()
        check_layer(num_features, eps, momentum, correction)
        self.num_features = int(num_features)
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.normalizers = check_normalizers(normalizers)
        self.num_groups = groups_of(num_groups, num_features)
        self.correction = correction
        self.track_running_stats = track_running_stats and 'BN' in self.normalizers

        for name in ('weight', 'bias'):
            self.register_parameter(
                name, nn.Parameter(torch.empty(num_features)) if affine else None
            )
        for name in ('mean_weight', 'var_weight'):
            self.register_parameter(name, nn.Parameter(torch.empty(len(self.normalizers))))
        tracked = self.track_running_stats
        self.register_buffer('running_mean', torch.zeros(num_features) if tracked else None)
        self.register_buffer('running_var', torch.ones(num_features) if tracked else None)
        self.register_buffer('num_batches_tracked', torch.tensor(0) if tracked else None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, no batch seen."""
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, equal importance ratios, fresh running statistics."""
        self.reset_running_stats()
        # Zero rather than any other constant: near it float32 resolves the first, tiny updates.
        nn.init.zeros_(self.mean_weight)
        nn.init.zeros_(self.var_weight)
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def _selection(self) -> Selection | None:
        return None

    def _ratios(self) -> tuple[Tensor, Tensor]:
        """Importance ratios of the means and of the variances, (K,) each."""
        return importance_ratios(self.mean_weight, self.var_weight, self._selection())

    @property
    def mean_ratios(self) -> Tensor:
        """Importance ratios of the means, shape (K,), detached."""
        with torch.no_grad():
            return self._ratios()[0]

    @property
    def var_ratios(self) -> Tensor:
        """Importance ratios of the variances, shape (K,), detached."""
        with torch.no_grad():
            return self._ratios()[1]

    @property
    def selected(self) -> tuple[str | None, str | None]:
        """Normalizers that the mean and the variance chose; None where ratios are not one-hot."""
        with torch.no_grad():
            return tuple(
                self.normalizers[ratios.index(1.0)] if 1.0 in ratios else None
                for ratios in torch.stack(self._ratios()).tolist()
            )

    def _check_input(self, x: Tensor) -> None:
        if x.dim() not in self._dims:
            dims = ' or '.join(f'{d}-D' for d in self._dims)
            raise ValueError(f'x: got shape {tuple(x.shape)}, expected {dims} (N, C, ...)')
        if x.shape[1] != self.num_features:
            raise ValueError(
                f'x: got {x.shape[1]} channels in shape {tuple(x.shape)}, '
                f'expected num_features={self.num_features}'
            )
        if not x.is_floating_point():
            raise ValueError(f'x: got {x.dtype}, expected a floating-point tensor')
        if not is_compiling() and torch._C._are_functorch_transforms_active():
            # Inside vmap 'BN' would not see the batch, and what it tracks would be lost.
            raise RuntimeError(
                f'{type(self).__name__}: got a call inside a transform of torch.func (vmap, grad, '
                '...), expected a plain call'
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
            RuntimeError: Inside a transform of ``torch.func``, such as ``vmap``.
        """
        self._check_input(x)
        # Straight from where nn.Module keeps them, as its attribute lookup takes longer than some
        # operators of a small input; functional_call swaps them there too.
        parameters, buffers = self._parameters, self._buffers
        running_mean, running_var = buffers['running_mean'], buffers['running_var']
        momentum, group = self.momentum or 0.0, self._group
        if self.training and running_mean is not None:
            batches = buffers['num_batches_tracked']
            if recomputes():
                # This batch is in them already. Copies rather than none: what is saved for backward
                # must be what the first pass saved.
                running_mean, running_var = running_mean.clone(), running_var.clone()
            else:
                batches.add_(1)
            if self.momentum is None:
                momentum = batches.to(running_mean.dtype).reciprocal()
            if x.shape[0] == 1 and group is None and not is_compiling():
                warn_of_one_sample(self)
        return switchable_norm(
            x,
            parameters['mean_weight'],
            parameters['var_weight'],
            parameters['weight'],
            parameters['bias'],
            running_mean,
            running_var,
            self.training,
            momentum,
            self._ratio_map,
            self._selection(),
            Settings(self.normalizers, self.num_groups, self.correction, self.eps),
            group,
        )

    def extra_repr(self) -> str:
        """The constructor's arguments, then the current ratios."""

        def shown(ratios: Tensor) -> str:
            pairs = zip(self.normalizers, ratios.tolist(), strict=True)
            return ' '.join(f'{name} {ratio:.3f}' for name, ratio in pairs)

        groups = ''
        if 'GN' in self.normalizers:
            other = {1: ' (which is LN)', self.num_features: ' (which is IN)'}
            groups = f', num_groups={self.num_groups}{other.get(self.num_groups, "")}'
        ratios = ''
        if not self.mean_weight.is_meta:  # there it has no value to show
            mean, var = shown(self.mean_ratios), shown(self.var_ratios)
            ratios = f', mean_ratios=({mean}), var_ratios=({var})'
        return (
            f'{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, '
            f'track_running_stats={self.track_running_stats}, normalizers={self.normalizers}'
            f'{groups}, correction={self.correction}{ratios}'
        )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        own = {**self._parameters, **self._buffers}
        for name, tensor in own.items():
            loaded = state_dict.get(prefix + name)
            # The release keeps (1, C, 1, 1), (1, C, 1) and [1] where the layer has (C,) and ().
            if tensor is not None and loaded is not None and loaded.numel() == tensor.numel():
                state_dict[prefix + name] = loaded.reshape(tensor.shape)
        if local_metadata.get('version') is None and self.track_running_stats:
            # Files written before this layer existed do not count batches.
            state_dict.setdefault(prefix + 'num_batches_tracked', self.num_batches_tracked)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
