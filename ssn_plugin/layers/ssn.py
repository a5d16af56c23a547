"""SSN: the layer that learns which normalizer it is."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ssn_plugin.functional import check_radius
from ssn_plugin.layers.frozen import held_choices, hold, known_choices
from ssn_plugin.layers.switchable import SwitchableNorm
from ssn_plugin.ops.switchable_norm.ratios import UNKNOWN, Selection, fixed_ratios, largest


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
    mmengine). What has become one-hot is frozen there: ``mean_fixed`` or ``var_fixed`` turns to 1
    and the ratios are constants from then on, whatever an optimizer, a weight decay or an averaging
    of models does to the control parameters, whose gradient is zero. Only what the selection needs
    is computed then; running statistics that it does not use are no longer updated.

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

    Attributes:
        mean_weight: Control parameters of the means, shape (K,).
        var_weight: Control parameters of the variances, shape (K,).
        radius: Buffer, 0-d.
        mean_fixed: Buffer, 0-d int64: 1 once the ratios of the means are frozen.
        var_fixed: Buffer, 0-d int64: 1 once the ratios of the variances are frozen.

    Raises:
        ValueError: If an argument is out of its range; the message names it.

    Note:
        A spatial size of one is no error: there the instance variance is zero. An empty batch comes
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

    _ratio_map = 'sparsestmax'

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
        )
        self.register_buffer('radius', torch.tensor(check_radius(radius)))
        for name in ('mean', 'var'):
            self.register_buffer(f'{name}_fixed', torch.tensor(0))
            # Index of the frozen candidate, apart from the control parameters: an optimizer's
            # momentum or an averaging of models may move those. Not in the file, where the control
            # parameters are that one-hot vector, as in the released files.
            self.register_buffer(f'{name}_choice', torch.tensor(UNKNOWN), persistent=False)

    def _selection(self) -> Selection:
        buffers = self._buffers
        return Selection(
            buffers['radius'],
            buffers['mean_fixed'],
            buffers['var_fixed'],
            buffers['mean_choice'],
            buffers['var_choice'],
            partial(known_choices, self),
        )

    def _fixed_ratios(self) -> tuple[Tensor, Tensor]:
        """Which of (mean, variance) are frozen, (2, 1), and the one-hot vectors, (2, K)."""
        return fixed_ratios(self.mean_weight, self.var_weight, self._selection())

    def reset_parameters(self) -> None:
        """As in the base class, and nothing is frozen; the radius stays."""
        super().reset_parameters()
        if 'var_choice' in self._buffers:  # not yet while the base class constructs
            for name in ('mean', 'var'):
                getattr(self, f'{name}_fixed').zero_()
                getattr(self, f'{name}_choice').fill_(UNKNOWN)
        hold(self, {})

    @torch.no_grad()
    def freeze(self, name: str, choice: int) -> None:
        """Freeze the ratios of one statistic.

        Args:
            name: 'mean' or 'var'.
            choice: Index of the candidate.
        """
        getattr(self, f'{name}_choice').fill_(choice)
        getattr(self, f'{name}_fixed').fill_(1)
        hold(self, {**held_choices(self), name: choice})
        self.restore_fixed()

    @torch.no_grad()
    def restore_fixed(self) -> None:
        """Write the frozen one-hot vectors back into the control parameters."""
        fixed, one_hot = self._fixed_ratios()
        for parameter, is_fixed, ratios in zip(
            (self.mean_weight, self.var_weight), fixed, one_hot, strict=True
        ):
            parameter.copy_(torch.where(is_fixed, ratios, parameter))

    def _hold_fixed(self) -> None:
        if self.mean_fixed.is_meta:  # shapes without values
            hold(self, {})
            return
        fixed, one_hot = self._fixed_ratios()
        rows = zip(
            ('mean', 'var'), fixed.flatten().tolist(), one_hot.argmax(-1).tolist(), strict=True
        )
        hold(self, {name: choice for name, is_fixed, choice in rows if is_fixed})

    def _apply(self, *args, **kwargs) -> nn.Module:
        super()._apply(*args, **kwargs)
        self._hold_fixed()  # on the new device, in the new dtype
        return self

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self._hold_fixed()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        # A file must never pair a fixed flag with control parameters that are not one-hot; in a
        # model averaged from others they may have moved.
        self.restore_fixed()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for name in ('mean', 'var'):
            fixed = state_dict.get(f'{prefix}{name}_fixed')
            control = state_dict.get(f'{prefix}{name}_weight')
            if fixed is None or control is None or fixed.is_meta:
                continue
            if bool(fixed.any()) and not bool(control.isfinite().all()):
                # argmax would take NaN for the choice.
                error_msgs.append(
                    f'{prefix}{name}_weight: got {control.tolist()} beside {name}_fixed=1, '
                    'expected a one-hot vector'
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in ('mean', 'var'):
            fixed, control = getattr(self, f'{name}_fixed'), getattr(self, f'{name}_weight')
            choice = torch.where(fixed > 0, largest(control.detach()).squeeze(-1), UNKNOWN)
            # A new tensor: a layer built on the meta device gets values only now.
            setattr(self, f'{name}_choice', choice)
        self.restore_fixed()
        self._hold_fixed()

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
