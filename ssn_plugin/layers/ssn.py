"""SSN: the layer that learns which normalizer it is."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssn_plugin.functional import check_not_negative
from ssn_plugin.layers.switchable import SwitchableNorm
from ssn_plugin.ops.sparsestmax import is_one_hot_radius
from ssn_plugin.ops.switchable_norm.ratios import (
    UNKNOWN,
    Choices,
    Control,
    Selection,
    has_values,
    largest,
    selected_ratios,
)
from ssn_plugin.torch_versions import is_compiling

_warned = False


def _warn_once(text: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(text, stacklevel=7)


class _Known(NamedTuple):
    """Choices that were read from the buffers, and the buffers' version counters at that time.

    Whoever writes to a buffer raises its counter, and what is known counts no more.
    """

    choices: Choices
    versions: tuple[int, ...]


def _versions(buffers: Mapping[str, Tensor]) -> tuple[int, ...]:
    return (
        buffers['mean_fixed']._version,
        buffers['var_fixed']._version,
        buffers['mean_choice']._version,
        buffers['var_choice']._version,
    )


class SSN(SwitchableNorm):
    r"""Sparse Switchable Normalization: one-hot importance ratios by the end of training.

    .. math::
        y = \frac{x - \sum_k p_k \mu_k}{\sqrt{\sum_k p'_k \sigma_k^2 + \epsilon}}
        \cdot \mathrm{weight} + \mathrm{bias}

    with the importance ratios

    .. math::
        p = \mathrm{SparsestMax}(\mathrm{mean\_weight}; r),\qquad
        p' = \mathrm{SparsestMax}(\mathrm{var\_weight}; r)

    The radius r grows during training (:func:`ssn_plugin.set_radius`, or ``SSNRadiusHook`` in
    mmengine). A mean or variance whose ratios have become one-hot is decided: ``mean_fixed`` or
    ``var_fixed`` turns to 1 and the ratios are constants from then on. The control parameters are
    not read any more and get a gradient of zero, so whatever an optimizer, a weight decay or an
    averaging of models does to them changes nothing; a state dict holds the one-hot vector in their
    place. Only what the selection needs is computed then; running statistics that it does not use
    are no longer updated.

    Args:
        num_features: C, the number of channels of (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W).
        eps: Added to the mixed variance.
        momentum: Weight of the new value in the running statistics; None is the cumulative average.
        affine: Whether to learn ``weight`` and ``bias``.
        track_running_stats: Whether 'BN' keeps running statistics for evaluation.
        normalizers: Candidates out of 'IN', 'LN', 'BN', 'GN'.
        num_groups: Groups of 'GN': the largest divisor of C up to it.
        correction: 0 for the paper's variances, 1 for those of the authors' release.
        radius: Initial radius of the circle.
        device: Of parameters and buffers.
        dtype: Of parameters and running statistics.

    Attributes:
        mean_weight: Control parameters of the means, shape (K,).
        var_weight: Control parameters of the variances, shape (K,).
        radius: Buffer, 0-d.
        mean_fixed: Buffer, 0-d int64: 1 once the mean is decided.
        var_fixed: Buffer, 0-d int64: 1 once the variance is decided.

    Raises:
        ValueError: If an argument is out of its range, or ``x`` is no input for the layer; the
            message names it.

    Note:
        In training, an undecided layer with 'IN' among its candidates refuses an input (N, C),
        because 'IN' would take its variance over one number; build such a layer with
        ``normalizers=('LN', 'BN', 'GN')``. For an input of one pixel per channel the layer only
        warns, once per process. In evaluation it accepts both. An empty batch comes
        back empty and leaves the running statistics alone, as with ``torch.nn.BatchNorm2d``.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN, set_radius
        >>> layer = SSN(8)
        >>> layer(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
        >>> set_radius(layer, 1.0)
        >>> layer.selected
        ('BN', 'BN')

    Source:
        Shao et al., "SSN: Learning Sparse Switchable Normalization via SparsestMax", IJCV 2020.
    """

    _known: _Known | None = None
    _pending = None  # choices on their way from a GPU, of set_radius
    # Most pixels and most values per channel of 'BN' that a training pass had, while asked for.
    values_seen: tuple[int, int] | None = None

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
        radius: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            normalizers,
            num_groups,
            correction,
            device,
            dtype,
        )
        self._initial_radius = check_not_negative(radius, 'radius')
        self.register_buffer('radius', torch.tensor(self._initial_radius, device=device))
        for name in ('mean', 'var'):
            self.register_buffer(f'{name}_fixed', torch.tensor(0, device=device))
            # Index of the selected candidate. Not in the file, where a one-hot vector in place of
            # the control parameters says it, as in the released files.
            choice = torch.tensor(UNKNOWN, device=device)
            self.register_buffer(f'{name}_choice', choice, persistent=False)
        self.learn_choices((None, None))

    def _selection(self) -> Selection:
        buffers = self._buffers
        return Selection(
            buffers['radius'],
            buffers['mean_fixed'],
            buffers['var_fixed'],
            buffers['mean_choice'],
            buffers['var_choice'],
        )

    def _control(self) -> Control:
        selection = self._selection()
        known = self.known_choices() or (None, None)
        control = self._tensor('mean_weight'), self._tensor('var_weight')
        return Control(*control, 'sparsestmax', selection, known)

    def known_choices(self) -> Choices | None:
        """Indices of the selected mean and variance, without reading a tensor.

        An index is None where nothing is selected, or on a GPU where the selection has not arrived.
        None for both where something wrote to the buffers since they were read last, as a broadcast
        or an averaging of models does. :func:`ssn_plugin.set_radius` reads them again.
        """
        known = self._known
        if known is None or is_compiling():  # which cannot ask for versions
            return known and known.choices
        return known.choices if known.versions == _versions(self._buffers) else None

    def learn_choices(self, choices: Choices | None = None) -> None:
        """Note the choices that the buffers hold, to spare work later.

        Args:
            choices: What they are, if the caller has just read or written them.
        """
        selection = self._selection()
        self._known = None
        # Tensors made in inference mode have no version counter.
        if not has_values(*selection) or any(tensor.is_inference() for tensor in selection):
            return
        self._known = _Known(choices or self._read_choices(), _versions(self._buffers))

    def _choices(self) -> Choices:
        known = self.known_choices()
        return self._read_choices() if known is None or None in known else known

    @torch.no_grad()
    def _read_choices(self) -> Choices:
        """Indices of the selected mean and variance; None for undecided."""
        fixed, one_hot = selected_ratios(self.mean_weight, self.var_weight, self._selection())
        pairs = zip(fixed.flatten().tolist(), one_hot.argmax(-1).tolist(), strict=True)
        return tuple(index if is_fixed else None for is_fixed, index in pairs)

    @property
    def selected(self) -> tuple[str | None, str | None]:
        """Normalizers that the mean and the variance selected; None where undecided."""
        choices = self._choices()
        if None in choices and is_one_hot_radius(self.radius.item(), len(self.normalizers)):
            # Set by the constructor or by a file; the next set_radius raises the flags.
            ratios = self.mean_ratios.tolist(), self.var_ratios.tolist()
            found = [values.index(1.0) if 1.0 in values else None for values in ratios]  # or NaN
            choices = [k if j is None else j for j, k in zip(choices, found, strict=True)]
        return tuple(None if k is None else self.normalizers[k] for k in choices)

    def _check_input(self, x: Tensor) -> None:
        super()._check_input(x)
        # Asked first: whatever a compiled graph reads, it is compiled anew for when that changes.
        if not is_compiling() and self.values_seen is not None and self.training:
            pixels = x.shape[2:].numel()
            pair = pixels, pixels * x.shape[0] * self._processes()
            self.values_seen = tuple(map(max, self.values_seen, pair))
        # Once a map of one pixel has been warned of, only (N, C) is looked at.
        if self.training and x.shape[2:].numel() == 1 and (x.dim() == 2 or not _warned):
            self._check_one_number(x)

    def _check_one_number(self, x: Tensor) -> None:
        """Refuse (N, C) in training while a candidate would take its variance over one number.

        Such a variance is 0. A map of one pixel may be one of several sizes, and a decided layer
        has nothing to choose any more: for these it is a warning, once per process.
        """
        if x.dim() == 2 and self.known_choices() is None and not is_compiling():
            self.learn_choices()
        choices = self.known_choices()
        if choices is None:
            return
        undecided = None in choices
        names = {'IN', 'GN'} if self.num_groups == self.num_features else {'IN'}
        names &= set(self.normalizers if undecided else (self.normalizers[k] for k in choices))
        if not names:
            return
        groups = self.num_groups not in (1, self.num_features)
        told = (
            f'where {sorted(names)[-1]!r} has a variance of 0, of one number: a layer that selects '
            'it puts out a constant, or multiplies by 1/sqrt(eps); build the layer with '
            f'normalizers={("LN", "BN", "GN") if groups else ("LN", "BN")}'
        )
        if x.dim() == 2 and undecided:
            raise ValueError(f'x: got shape {tuple(x.shape)} in training, {told}')
        if not is_compiling():
            _warn_once(f'{type(self).__name__} got shape {tuple(x.shape)} in training, {told}')

    def _processes(self) -> int:
        return dist.get_world_size(self._group) if self._group is not None else 1

    def _uses_batch(self) -> bool:
        choices = self.known_choices() or (None, None)
        return None in choices or self.normalizers.index('BN') in choices

    def reset_parameters(self) -> None:
        """As in the base class; the layer is undecided and its radius is the constructor's."""
        super().reset_parameters()
        if 'var_choice' not in self._buffers:  # the base class is still constructing
            return
        self.radius.fill_(self._initial_radius)
        for name in ('mean', 'var'):
            getattr(self, f'{name}_fixed').zero_()
            getattr(self, f'{name}_choice').fill_(UNKNOWN)
        self.learn_choices((None, None))

    @torch.no_grad()
    def select(self, mean: str | None = None, var: str | None = None) -> None:
        """Decide the mean, the variance or both.

        Args:
            mean: The candidate to select for the mean; None leaves it as it is.
            var: The same for the variance.

        Raises:
            ValueError: If one is no candidate of the layer.

        Example:
            >>> from ssn_plugin import SSN
            >>> layer = SSN(8)
            >>> layer.select(mean='LN', var='BN')
            >>> layer.selected
            ('LN', 'BN')
        """
        for name, choice in (('mean', mean), ('var', var)):
            if choice is not None and choice not in self.normalizers:
                raise ValueError(f'{name}: got {choice!r}, expected one of {self.normalizers}')
        for name, choice in (('mean', mean), ('var', var)):
            if choice is not None:
                getattr(self, f'{name}_choice').fill_(self.normalizers.index(choice))
                getattr(self, f'{name}_fixed').fill_(1)
        self.learn_choices()

    def _apply(self, *args, **kwargs) -> nn.Module:
        super()._apply(*args, **kwargs)
        self.learn_choices()  # the buffers are others now, with other version counters
        return self

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != '_pending'}

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self.learn_choices()

    @torch.no_grad()
    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars or not has_values(*self._selection()):
            return
        choices = self._choices()
        for name, choice in zip(('mean', 'var'), choices, strict=True):
            control = destination.get(f'{prefix}{name}_weight')
            if choice is not None and type(control) is Tensor and control.dim() == 1:
                one_hot = torch.zeros_like(control)
                one_hot[choice] = 1
                destination[f'{prefix}{name}_weight'] = one_hot

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for name in ('mean', 'var'):
            fixed = state_dict.get(f'{prefix}{name}_fixed')
            control = state_dict.get(f'{prefix}{name}_weight')
            if fixed is None or fixed.is_meta:
                continue
            if control is None or control.numel() != len(self.normalizers):
                # A flag says nothing without the vector that says what was selected, and a radius
                # without control parameters would select among those that are here.
                state_dict[f'{prefix}{name}_fixed'] = torch.zeros_like(fixed)
                state_dict[f'{prefix}radius'] = self.radius
            elif bool(fixed.any()) and not bool(control.isfinite().all()):
                # argmax would take NaN for the choice.
                error_msgs.append(
                    f'{prefix}{name}_weight: got {control.tolist()} beside {name}_fixed=1, '
                    'expected a one-hot vector'
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in ('mean', 'var'):
            if f'{prefix}{name}_fixed' in state_dict:
                fixed, control = getattr(self, f'{name}_fixed'), getattr(self, f'{name}_weight')
                choice = torch.where(fixed > 0, largest(control.detach()).squeeze(-1), UNKNOWN)
                # A new tensor: a layer built on the meta device gets values only now.
                setattr(self, f'{name}_choice', choice)
        self.learn_choices()

    def extra_repr(self) -> str:
        """The constructor's arguments, the current ratios and the selection."""
        if self.radius.is_meta:
            return super().extra_repr()
        return f'{super().extra_repr()}, radius={self.radius.item():.4f}, selected={self.selected}'


class SSN1d(SSN):
    """SSN for (N, C) and (N, C, L) alone; see :class:`SSN`."""

    _dims = (2, 3)


class SSN2d(SSN):
    """SSN for (N, C, H, W) alone; see :class:`SSN`."""

    _dims = (4,)


class SSN3d(SSN):
    """SSN for (N, C, D, H, W) alone; see :class:`SSN`."""

    _dims = (5,)
