"""Weights of a network with BatchNorm or SN, as those of an SSN that starts as that network."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from ssn_plugin.checkpoint.layout import backbone_of, norm_layers, shown
from ssn_plugin.errors import CheckpointError
from ssn_plugin.functional import check_normalizers

BN_RATIO = 0.9
CANDIDATES = ('IN', 'LN', 'BN')
# The stem of ResNets with BatchNorm pools with padding 1; that of the SSN release with none.
STEM_PADDING = 1


def batch_norm_to_ssn(
    state: Mapping[str, Tensor],
    path: str,
    bn_ratio: float = BN_RATIO,
    fix: bool = False,
    normalizers: Sequence[str] = CANDIDATES,
) -> OrderedDict[str, Tensor]:
    r"""The ResNet of a state dict with BatchNorm as one with SSN.

    bn1 becomes sn1; weight, bias and running statistics stay. A point of the simplex is its own
    sparsemax, so the control parameters are the wanted importance ratios themselves,

    .. math::
        z_{BN} = r, \qquad z_k = \frac{1 - r}{K - 1} \text{ for the others,}

    for mean and variance alike, at radius zero. With r = 1 the network is the BatchNorm network.
    With r = 0.9 it is nearly that, and it is still free to choose.

    Args:
        state: State dict of a ResNet of torchvision, timm, mmpretrain, mmdet or mmseg, or of a
            model with one under ``backbone.``.
        path: Where it is from, for errors.
        bn_ratio: Importance ratio r of BN, in [0, 1].
        fix: Freeze that choice; only for r = 1.
        normalizers: Candidates of the SSN layers to be filled.

    Returns:
        State dict of the backbone alone, in the names of ``SSNResNet``.

    Raises:
        ValueError: If ``bn_ratio`` is outside [0, 1], ``fix`` is asked for at another ratio than 1,
            or BN is no candidate.
        CheckpointError: If there is no ResNet with BatchNorm in it.

    Example:
        >>> import torch
        >>> from ssn_plugin.checkpoint.warm_start import batch_norm_to_ssn
        >>> state = {'layer1.0.conv1.weight': torch.ones(1, 1, 1, 1)}
        >>> norm = torch.nn.BatchNorm2d(1).state_dict()
        >>> state |= {f'layer1.0.bn1.{name}': value for name, value in norm.items()}
        >>> batch_norm_to_ssn(state, 'net.pth')['layer1.0.sn1.mean_weight']
        tensor([0.0500, 0.0500, 0.9000])
    """
    check_warm_start(bn_ratio, fix, normalizers)
    others = (1 - bn_ratio) / (len(normalizers) - 1)
    ratios = torch.tensor([bn_ratio if name == 'BN' else others for name in normalizers])
    state, _ = backbone_of(state, path)
    kinds = norm_layers(state)
    if set(kinds.values()) != {'BN'}:
        held = ' and '.join(sorted(set(kinds.values()))) or 'no norm'
        raise CheckpointError(f'{path}: holds {held} layers, expected BatchNorm layers alone')
    statistics = (key.rpartition('.') for key in state)
    layers = {name for name, _, last in statistics if last in ('running_mean', 'running_var')}
    wanted = ('weight', 'bias', 'running_mean', 'running_var')
    missing = [f'{name}.{key}' for name in sorted(layers) for key in wanted]
    missing = [key for key in missing if key not in state]
    if missing:
        raise CheckpointError(f'{path}: lacks {shown(missing)} (sn is for bn here)')
    converted = OrderedDict()
    for key, value in state.items():
        converted[key] = value
        name, _, last = key.rpartition('.')
        if name in kinds and last == 'running_var':
            converted |= _control(name, ratios, ratios, fixed=fix)
    return converted


def check_warm_start(bn_ratio: float, fix: bool, normalizers: Sequence[str]) -> None:
    """Raise ValueError naming what is wrong with the arguments of :func:`batch_norm_to_ssn`."""
    if not isinstance(bn_ratio, Real) or not 0 <= bn_ratio <= 1:
        raise ValueError(f'bn_ratio: got {bn_ratio!r}, expected a number in [0, 1]')
    if fix and bn_ratio != 1:
        raise ValueError(f'fix: a ratio of {bn_ratio} is not one-hot, expected bn_ratio=1')
    if 'BN' not in check_normalizers(normalizers):
        raise ValueError(f"normalizers: got {tuple(normalizers)!r}, expected 'BN' among them")


def switch_norm_to_ssn(state: Mapping[str, Tensor], path: str) -> OrderedDict[str, Tensor]:
    """The ResNet of a state dict with SN as one with SSN that computes the same.

    The control parameters become the softmax of SN's: a point of the simplex is its own sparsemax,
    so at radius zero the importance ratios are SN's to rounding, and the network is the SN network.

    Args:
        state: State dict of a ResNet with SN, or of a model with one under ``backbone.``.
        path: Where it is from, for errors.

    Returns:
        State dict of the backbone alone, in the names of ``SSNResNet``.

    Raises:
        CheckpointError: If there is no ResNet with SN in it.
    """
    state, _ = backbone_of(state, path)
    kinds = norm_layers(state)
    if 'SN' not in kinds.values():
        held = ' and '.join(sorted(set(kinds.values()))) or 'no norm'
        raise CheckpointError(f'{path}: holds {held} layers, expected SN layers')
    converted = OrderedDict(state)
    for name, kind in kinds.items():
        if kind == 'SN':
            ratios = (state[f'{name}.{which}_weight'].softmax(-1) for which in ('mean', 'var'))
            converted |= _control(name, *ratios, fixed=False)
    return converted


def _control(name: str, mean: Tensor, var: Tensor, fixed: bool) -> dict[str, Tensor]:
    return {
        f'{name}.mean_weight': mean.clone(),
        f'{name}.var_weight': var.clone(),
        f'{name}.mean_fixed': torch.tensor(int(fixed)),
        f'{name}.var_fixed': torch.tensor(int(fixed)),
        f'{name}.radius': torch.tensor(0.0),
    }
