"""What the layers share: parameters, running statistics, input checks, state dict."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssn_plugin.errors import CheckpointError
from ssn_plugin.functional import check_layer, check_normalizers, groups_of
from ssn_plugin.layers.fx_leaf import as_leaf, is_symbolic
from ssn_plugin.ops.switchable_norm.dispatch import switchable_norm
from ssn_plugin.ops.switchable_norm.exportable import switchable_norm as exportable_norm
from ssn_plugin.ops.switchable_norm.ratios import Control, ratio_tensors
from ssn_plugin.ops.switchable_norm.statistics import BatchStatistics, Moments, Settings
from ssn_plugin.torch_versions import is_compiling

# What so many candidates are in a file that does not name them, as the released ones do not.
UNNAMED_CANDIDATES = {2: ('IN', 'LN'), 3: ('IN', 'LN', 'BN'), 4: ('IN', 'LN', 'BN', 'GN')}

_warned = False


@contextmanager
def _not_traced() -> Iterator[None]:
    """Keep what is computed out of the graph that torch.jit.trace makes."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def _recomputes() -> bool:
    """Whether gradient checkpointing runs a forward pass of this step once more.

    It does so inside the backward pass. A compiled graph cannot ask.
    """
    return not is_compiling() and torch._C._current_graph_task_id() != -1


class StatisticsNorm(nn.Module):
    """Base of the norm layers of this package: an affine map, running statistics, input checks.

    Its arguments are those of :class:`ssn_plugin.SSN` that have the same names.
    """

    _dims: tuple[int, ...] = (2, 3, 4, 5)
    _group = None  # processes over whose batches together 'BN' takes its statistics

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        num_groups: int,
        correction: int,
    ) -> None:
        super().__init__()
        check_layer(num_features, eps, momentum, correction)
        self.num_features = int(num_features)
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.num_groups = groups_of(num_groups, self.num_features)
        self.correction = correction

    def _add_affine(self, factory: dict) -> None:
        for name in ('weight', 'bias'):
            value = nn.Parameter(torch.empty(self.num_features, **factory)) if self.affine else None
            self.register_parameter(name, value)

    def _add_running_stats(self, factory: dict) -> None:
        tracked, device = self.track_running_stats, factory['device']
        for name in ('running_mean', 'running_var'):
            value = torch.empty(self.num_features, **factory) if tracked else None
            self.register_buffer(name, value)
        batches = torch.tensor(0, device=device) if tracked else None
        self.register_buffer('num_batches_tracked', batches)

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, no batch seen."""
        for name, value in (('running_mean', 0), ('running_var', 1), ('num_batches_tracked', 0)):
            if getattr(self, name) is not None:
                getattr(self, name).fill_(value)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, fresh running statistics."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

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

    def _tensor(self, name: str) -> Tensor | None:
        """A parameter or buffer, also where pruning or a parametrization took its place.

        nn.Module's own lookup is tried last: it takes longer than some operators on a small input.
        """
        if name in self._parameters:
            return self._parameters[name]
        return self._buffers[name] if name in self._buffers else getattr(self, name)

    def _batch_statistics(self, x: Tensor) -> BatchStatistics:
        """What 'BN' does with the running statistics now, by the rules of nn.BatchNorm2d."""
        mean, var = self._tensor('running_mean'), self._tensor('running_var')
        if not self.training:
            return BatchStatistics(given=None if mean is None else Moments(mean, var))
        if mean is None or not self.track_running_stats:
            return BatchStatistics()
        batches, momentum = self._tensor('num_batches_tracked'), self.momentum or 0.0
        if _recomputes():
            # This batch is in them already. Copies rather than none: what is saved for backward
            # must be what the first pass saved.
            mean, var = mean.clone(), var.clone()
        elif batches is not None:
            batches.add_(1)
        if self.momentum is None:
            momentum = batches.to(mean.dtype).reciprocal()
        return BatchStatistics(tracked=Moments(mean, var), momentum=momentum)

    def _settings(self) -> Settings:
        raise NotImplementedError

    def _control(self) -> Control:
        raise NotImplementedError

    def _constant_ratios(self) -> tuple[list[float], list[float]]:
        """Importance ratios as numbers, for whoever records the layer in evaluation."""
        raise NotImplementedError

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
        if is_symbolic(x):
            return as_leaf(self, x)
        weight, bias = self._tensor('weight'), self._tensor('bias')
        if not self.training and self._is_recorded():
            given = self._batch_statistics(x).given
            ratios = self._constant_ratios()
            return exportable_norm(x, *ratios, weight, bias, given, self._settings())
        self._check_input(x)
        return switchable_norm(
            x,
            self._control(),
            weight,
            bias,
            self._batch_statistics(x),
            self._settings(),
            self._group,
        )

    def _is_recorded(self) -> bool:
        """Whether a graph is made that should hold plain operators and constant ratios."""
        return torch.jit.is_tracing()


class SwitchableNorm(StatisticsNorm):
    """Base of the layers that mix the statistics of several normalizers.

    A subclass says how control parameters become importance ratios, by :meth:`_control`.

    Its arguments are those of :class:`ssn_plugin.SSN` without the radius.
    """

    _version = 1
    _abbr_ = 'sn'  # mmcv names a norm by it: sn1, sn2, ... as in the released files

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, num_groups, correction
        )
        self.normalizers = check_normalizers(normalizers)
        self.track_running_stats = track_running_stats and 'BN' in self.normalizers
        factory = dict(device=device, dtype=dtype)
        self._add_affine(factory)
        for name in ('mean_weight', 'var_weight'):
            control = nn.Parameter(torch.empty(len(self.normalizers), **factory))
            self.register_parameter(name, control)
        self._add_running_stats(factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, equal importance ratios, fresh running statistics."""
        super().reset_parameters()
        # Zero rather than any other constant: near it float32 resolves the first, tiny updates.
        nn.init.zeros_(self.mean_weight)
        nn.init.zeros_(self.var_weight)

    def _settings(self) -> Settings:
        return Settings(self.normalizers, self.num_groups, self.correction, self.eps)

    def _control(self) -> Control:
        return Control(self._tensor('mean_weight'), self._tensor('var_weight'), 'softmax')

    def _constant_ratios(self) -> tuple[list[float], list[float]]:
        with _not_traced():  # exporters stumble over how the ratios come about
            return self.mean_ratios.tolist(), self.var_ratios.tolist()

    @property
    def mean_ratios(self) -> Tensor:
        """Importance ratios of the means, shape (K,), detached."""
        with torch.no_grad():
            return ratio_tensors(self._control())[0]

    @property
    def var_ratios(self) -> Tensor:
        """Importance ratios of the variances, shape (K,), detached."""
        with torch.no_grad():
            return ratio_tensors(self._control())[1]

    @property
    def selected(self) -> tuple[str | None, str | None]:
        """Normalizers that the mean and the variance selected; None where undecided."""
        with torch.no_grad():
            return tuple(
                self.normalizers[ratios.index(1.0)] if 1.0 in ratios else None
                for ratios in torch.stack(ratio_tensors(self._control())).tolist()
            )

    def _uses_batch(self) -> bool:
        """Whether 'BN' takes part, as far as that is known without reading a tensor."""
        return 'BN' in self.normalizers

    def _batch_statistics(self, x: Tensor) -> BatchStatistics:
        batch = super()._batch_statistics(x)
        if (
            batch.tracked is not None
            and x.shape[0] == 1
            and self._group is None
            and not is_compiling()
        ):
            self._warn_of_one_sample()
        return batch

    def _warn_of_one_sample(self) -> None:
        """Warn once per process that one sample does not tell the candidates BN and IN apart."""
        global _warned
        if _warned or 'IN' not in self.normalizers or not self._uses_batch():
            return
        _warned = True
        warnings.warn(
            f"{type(self).__name__} got a batch of one sample in training. There 'BN' computes "
            "what 'IN' does, but in evaluation it uses running statistics: a layer that selects it "
            "performs worse then. Set normalizers=('LN', 'GN', 'BN') in layers that have yet to "
            'select, take more samples per process, or let several processes share statistics with '
            'SyncSSN.',
            stacklevel=5,
        )

    def extra_repr(self) -> str:
        """The constructor's arguments, then the current ratios."""

        def with_names(ratios: Tensor) -> str:
            pairs = zip(self.normalizers, ratios.tolist(), strict=True)
            return ' '.join(f'{name} {ratio:.3f}' for name, ratio in pairs)

        groups = ''
        if 'GN' in self.normalizers:
            other = {1: ' (which is LN)', self.num_features: ' (which is IN)'}
            groups = f', num_groups={self.num_groups}{other.get(self.num_groups, "")}'
        ratios = ''
        if not self.mean_weight.is_meta:  # there it has no value to show
            mean, var = with_names(self.mean_ratios), with_names(self.var_ratios)
            ratios = f', mean_ratios=({mean}), var_ratios=({var})'
        return (
            f'{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, '
            f'track_running_stats={self.track_running_stats}, normalizers={self.normalizers}'
            f'{groups}, correction={self.correction}{ratios}'
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside the version, where torch keeps what is no tensor.
        if hasattr(destination, '_metadata') and prefix[:-1] in destination._metadata:
            destination._metadata[prefix[:-1]]['normalizers'] = self.normalizers

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        self._check_candidates(state_dict, prefix, local_metadata)
        own = {**self._parameters, **self._buffers}
        for name, tensor in own.items():
            loaded = state_dict.get(prefix + name)
            # The release keeps (1, C, 1, 1), (1, C, 1) and [1] where the layer has (C,) and ().
            if tensor is not None and loaded is not None and loaded.numel() == tensor.numel():
                state_dict[prefix + name] = loaded.reshape(tensor.shape)
        batches = self._buffers['num_batches_tracked']
        if local_metadata.get('version') is None and batches is not None:
            # Files written before this layer existed do not count batches. A layer on the meta
            # device has no count to keep.
            mean = state_dict.get(f'{prefix}running_mean')
            fresh = torch.tensor(0, device=None if mean is None else mean.device)
            count = fresh if batches.is_meta else batches
            state_dict.setdefault(f'{prefix}num_batches_tracked', count)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_candidates(self, state_dict, prefix: str, local_metadata: dict) -> None:
        """Raise CheckpointError if the control parameters are known to be of other candidates.

        It is raised even where loading is not strict, as torch does for shapes: mmengine only logs
        the messages that are collected.
        """
        control = state_dict.get(f'{prefix}mean_weight')
        if control is None or control.numel() != len(self.normalizers):
            return  # nothing is loaded, or torch reports the shape
        named = local_metadata.get('normalizers')
        candidates = tuple(named or UNNAMED_CANDIDATES.get(control.numel(), self.normalizers))
        if not named and set(candidates) != set(self.normalizers):
            fixed, vector = (state_dict.get(f'{prefix}{name}') for name in ('mean_fixed', 'weight'))
            released = (fixed is not None and fixed.dim() == 1) or (
                vector is not None and vector.dim() == 4
            )
            if not released:
                # A plain dict of tensors has lost the record, as in
                # {key: value.clone() for key, value in model.state_dict().items()}.
                return
        if candidates != self.normalizers:
            raise CheckpointError(
                f'{prefix[:-1] or type(self).__name__}: got control parameters of the candidates '
                f'{candidates}, expected those of the layer, {self.normalizers}; build the layer '
                f'with normalizers={candidates}'
            )
