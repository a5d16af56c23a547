"""Weights of a network with BatchNorm or SN, as those of an SSN that starts as that network."""

import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssn_plugin.checkpoint.files import meta_in
from ssn_plugin.checkpoint.layout import norm_layers, places_of, shown
from ssn_plugin.checkpoint.matching import check_shortcuts, in_names_of, key_differences
from ssn_plugin.errors import CheckpointError
from ssn_plugin.layers.convert import (
    BN_RATIO,
    CANDIDATES,
    check_warm_start,
    control_of,
    control_of_bn,
)
from ssn_plugin.layers.ssn import SSN

_CONTROL = control_of_bn(CANDIDATES, 1).keys()
# The stem of ResNets with BatchNorm pools with padding 1; that of the SSN release with none.
STEM_PADDING = 1


def batch_norm_to_ssn(
    state: Mapping[str, Tensor],
    path: str,
    bn_ratio: float = BN_RATIO,
    fix: bool = False,
    normalizers: Sequence[str] = CANDIDATES,
) -> OrderedDict[str, Tensor]:
    """Every BatchNorm of a state dict as an SSN; everything else as it is.

    Layers that mmcv names by their type are renamed: bn1 becomes sn1, ``bn`` becomes ``sn``. What
    the control parameters become is told by :func:`ssn_plugin.convert_batch_norm`.

    ``normalizers`` are the candidates of the layers to be filled; ``fix`` decides them for BN.

    Raises:
        ValueError: If ``bn_ratio`` is outside [0, 1], ``fix`` is asked for at another ratio than 1,
            or BN is no candidate.
        CheckpointError: If there is no BatchNorm in it, or half of one.

    Example:
        >>> import torch
        >>> from ssn_plugin.checkpoint.warm_start import batch_norm_to_ssn
        >>> norm = torch.nn.BatchNorm2d(1).state_dict()
        >>> state = {f'layer1.0.bn1.{name}': value for name, value in norm.items()}
        >>> batch_norm_to_ssn(state, 'net.pth')['layer1.0.sn1.mean_weight']
        tensor([0.0500, 0.0500, 0.9000])
    """
    check_warm_start(bn_ratio, normalizers)
    if fix and bn_ratio != 1:
        raise ValueError(f'fix: a ratio of {bn_ratio} is not one-hot, expected bn_ratio=1')
    kinds = _norms_in(state, 'BN', path)
    _check_whole(state, kinds, path)
    converted = OrderedDict()
    converted._metadata = {}
    for place, entries in places_of(state).items():
        if kinds.get(place) == 'BN':
            place = re.sub(r'(^|\.)bn(\d*)$', r'\1sn\2', place)
            entries = entries | control_of_bn(normalizers, bn_ratio, fix)
            converted._metadata[place] = {'normalizers': tuple(normalizers)}
        converted |= _below(place, entries)
    return converted


def switch_norm_to_ssn(state: Mapping[str, Tensor], path: str) -> OrderedDict[str, Tensor]:
    """Every SN of a state dict as the SSN that computes the same; everything else as it is.

    The control parameters become the softmax of SN's: a point of the simplex is its own sparsemax,
    so at radius zero the importance ratios are SN's to rounding, and the network is the SN network.

    Raises:
        CheckpointError: If there is no SN in it.
    """
    converted = OrderedDict(state)
    for place, kind in _norms_in(state, 'SN', path).items():
        if kind == 'SN':
            ratios = (state[f'{place}.{which}_weight'].softmax(-1) for which in ('mean', 'var'))
            converted |= _below(place, control_of(*ratios))
    return converted


def _norms_in(state: Mapping[str, Tensor], wanted: str, path: str) -> dict[str, str]:
    kinds = norm_layers(state)
    if wanted not in kinds.values() or 'SSN' in kinds.values():
        held = ' and '.join(sorted(set(kinds.values()))) or 'no norm'
        # A BatchNorm without running statistics holds what LN, GN and IN do.
        expected = {'BN': 'BatchNorm layers with running statistics', 'SN': 'SN layers'}[wanted]
        raise CheckpointError(f'{path}: holds {held} layers, expected {expected}')
    return kinds


def _check_whole(state: Mapping[str, Tensor], kinds: Mapping[str, str], path: str) -> None:
    """Half a BatchNorm must not become an SSN that lacks something."""
    missing = []
    for place, entries in places_of(state).items():
        if kinds.get(place) == 'BN':
            pairs = (('running_mean', 'running_var'), ('weight', 'bias'))
            halves = (pair for pair in pairs if sum(name in entries for name in pair) == 1)
            missing += [f'{place}.{n}' for pair in halves for n in pair if n not in entries]
    if missing:
        raise CheckpointError(f'{path}: lacks {shown(missing)}')


def _below(place: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f'{place}.{entry}'.removeprefix('.'): value for entry, value in entries.items()}


class Fitted(NamedTuple):
    """Weights of a file as a module takes them.

    Attributes:
        state: The weights, in the module's names.
        left_out: Keys of the file that the module has no use for.
        lines: What else is to be said of them.
    """

    state: OrderedDict[str, Tensor]
    left_out: tuple[str, ...]
    lines: tuple[str, ...]


def bn_ratio_of(checkpoint: Mapping) -> float | None:
    """The importance ratio of BN in a checkpoint that was converted; None for others."""
    ratio = meta_in(checkpoint).get('bn_ratio')
    return ratio if isinstance(ratio, int | float) else None


def fit(
    module: nn.Module, state: Mapping[str, Tensor], path: str, bn_ratio: float | None
) -> Fitted:
    """Give weights the names of a module, and converted norms its candidates and frozen layers.

    An SSN of whatever candidates with BN among them starts from a BatchNorm; a BatchNorm that the
    module kept stays one. An SSN whose control parameters require no gradient would never choose,
    so it is decided for BN, exactly the BatchNorm that it was. Averages and teachers require none
    either, but follow what is trained.

    The module is a backbone, a neck, a head or a whole model; ``bn_ratio`` is that of
    :func:`bn_ratio_of`.

    Raises:
        CheckpointError: If shapes agree and the networks do not.
    """
    module.train(module.training)  # where the frameworks freeze stages
    layers = dict(module.named_modules(remove_duplicate=False))
    following = _following(layers)
    own = module.state_dict()
    renamed = in_names_of(own, state)
    check_shortcuts(own, state, renamed.prefix, path)
    fitted, decided, strange = OrderedDict(), [], []
    fitted._metadata = renamed.state._metadata
    for place, entries in places_of(renamed.state).items():
        layer = layers.get(place)
        if bn_ratio is not None and 'mean_fixed' in entries:
            if isinstance(layer, SSN) and 'BN' in layer.normalizers:
                frozen = not (layer.mean_weight.requires_grad or place.startswith(following))
                entries |= control_of_bn(
                    layer.normalizers, bn_ratio, frozen or bool(entries['mean_fixed'])
                )
                fitted._metadata[place] = {'normalizers': layer.normalizers}
                decided += [place] * frozen
            else:
                entries = {k: v for k, v in entries.items() if k not in _CONTROL}
                if not isinstance(layer, _BatchNorm):
                    strange += _below(place, entries)
                    continue
        fitted |= _below(place, entries)
    outside = [key for key in state if not key.startswith(renamed.prefix)]
    lines = []
    if decided:
        lines.append(f'frozen, so decided for BN, exactly BatchNorm: {by_part(decided)} layers')
    if renamed.by_order:
        pairs = [f'{file} is {model}' for file, model in renamed.by_order]
        lines.append(f'found by their order: {shown(pairs)}')
    return Fitted(fitted, (*outside, *strange), tuple(lines))


def _following(layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Where the averages of torch and mmengine lie in a model, and the teacher beside a student."""
    averages = (n for n, part in layers.items() if callable(getattr(part, 'update_parameters', 0)))
    teacher = ('teacher.',) if {'teacher', 'student'} <= layers.keys() else ()
    return (*(f'{name}.' for name in averages), *teacher)


def warm_start(
    module: nn.Module, state: Mapping[str, Tensor], path: str, bn_ratio: float | None
) -> tuple[OrderedDict[str, Tensor], list[str], str]:
    """What a module takes of a converted file, with every key accounted for.

    Returns:
        The weights, lines for the log, and what the file does not fill, '' if nothing.

    Raises:
        CheckpointError: If not one SSN of the module is filled, or one has other channels.
    """
    own = module.state_dict()
    fitted, left_out, lines = fit(module, state, path, bn_ratio)
    missing, unexpected, misshapen = key_differences(own, fitted)
    named = module.named_modules(remove_duplicate=False)
    layers = [name for name, layer in named if isinstance(layer, SSN)]
    lacking = {key.rpartition('.')[0] for key in (*missing, *misshapen)}
    filled = [name for name in layers if name not in lacking]
    wrong = [text for key, text in misshapen.items() if key.rpartition('.')[0] in layers]
    if not layers:
        raise CheckpointError(
            f"{path}: the model has no SSN layer to fill: set norm_cfg=dict(type='SSN') in it or, "
            "where it has no norm_cfg, type='ConvertedSSN' and network=... for its type"
        )
    if wrong or not filled:
        norms = [name for name, kind in norm_layers(state).items() if kind == 'SSN']
        why = shown(wrong) or f'it has {shown(norms)}, the model {shown(layers)}'
        raise CheckpointError(
            f'{path}: its norms fill {len(filled)} of {len(layers)} SSN layers: {why}'
        )
    # Where the file fills an SSN only in part, none of its entries for that layer is loaded.
    partly = {key for key in fitted if key.rpartition('.')[0] in set(layers) - set(filled)}
    unfit = {*unexpected, *misshapen, *partly}
    for key in unfit:
        del fitted[key]
    at = '' if bn_ratio is None else f' at an importance ratio of {bn_ratio} for BN'
    said = [
        f'{path}: {len(filled)} of {len(layers)} SSN layers start from its norms{at}; '
        f'{len(fitted)} of {len(own)} weights and buffers are filled',
        *lines,
    ]
    if left_out or unfit:
        said.append(f'left out of the file: {by_part((*left_out, *sorted(unfit)))}')
    anew = [key for key in own if key not in fitted and not key.endswith('num_batches_tracked')]
    return fitted, said, f'start anew, not in {path}: {shown(anew)}' if anew else ''


def by_part(keys: Iterable[str]) -> str:
    """How many keys there are below each first name, as 'backbone (5), neck (2)'."""
    counts = Counter(key.split('.')[0] for key in keys)
    return shown([f'{part} ({count})' for part, count in counts.items()], limit=8)
