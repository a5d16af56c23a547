"""Which weight of a file is which of a model, whatever both call their layers.

A *place* is what a module holds itself: the entries of a state dict that differ in their last name
alone. Places match by name, where bn1, sn1, gn1 and ``bn``, ``sn`` count as the same; what then is
left over on both sides matches by its order, if shapes agree one by one. So a stem that is
``conv1.0``, ``conv1.1``, ... in timm is ``stem.0``, ``stem.1``, ... in mmdet, and ``conv1.conv``,
``conv1.bn`` of mmaction2 are ``conv1``, ``bn1``.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ssn_plugin.checkpoint.layout import (
    Layout,
    describe,
    is_classifier,
    norm_kind,
    places_of,
    shown,
)
from ssn_plugin.errors import CheckpointError

_ADVICE = {
    'BN': "; take it as 'bn2ssn://{path}' to start from BatchNorm weights",
    'SN': "; take it as 'sn2ssn://{path}' to start from SN's importance ratios",
}
_NORM_NAME = re.compile(r'\b(?:bn|sn|gn|in)(\d*)(?=\.|$)')


class Renamed(NamedTuple):
    """A file's weights in a model's names.

    Attributes:
        state: Matched entries in the model's names; others in the file's, without ``prefix``.
        prefix: Under which the model was found in the file.
        by_order: Places that no name matched, as the file and as the model calls them.
    """

    state: OrderedDict[str, Tensor]
    prefix: str
    by_order: tuple[tuple[str, str], ...]


def in_names_of(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> Renamed:
    """Rename a file's weights as a model calls them.

    Args:
        own: The model's state dict.
        loaded: The file's, which may be that of a larger model with this one under a prefix, or of
            a part of the model, which it may have several times.

    Example:
        >>> import torch
        >>> from ssn_plugin.checkpoint.matching import in_names_of
        >>> file = {'backbone.bn1.weight': torch.ones(8), 'head.weight': torch.ones(2, 8)}
        >>> dict(in_names_of({'sn1.weight': torch.ones(8)}, file).state)
        {'sn1.weight': tensor([1., 1., 1., 1., 1., 1., 1., 1.])}
    """
    loaded = _for_parts(own, loaded)
    renamed = _in_names_of(own, loaded, _prefix(own, loaded))
    # Where no name is alike, none tells the prefix; the order may.
    if not renamed.prefix and len(renamed.by_order) == len(places_of(own)):
        around = {file.partition('.')[0] for file, _ in renamed.by_order}
        if len(around) == 1 and not around & {key.partition('.')[0] for key in own}:
            return _in_names_of(own, loaded, f'{around.pop()}.')
    return renamed


def _in_names_of(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], prefix: str) -> Renamed:
    inside = {key.removeprefix(prefix): key for key in loaded if key.startswith(prefix)}
    theirs = places_of({key: loaded[called] for key, called in inside.items()})
    ours = places_of(own)
    found = _by_name(ours, theirs)
    by_order = _by_order(ours, theirs, found)
    called = {file: model for model, file in found.items()} | dict(by_order)
    state = OrderedDict()
    for key, original in inside.items():
        place, dot, entry = key.rpartition('.')
        state[f'{called.get(place, place)}{dot}{entry}'] = loaded[original]
    known = getattr(loaded, '_metadata', {})
    state._metadata = {called.get(place, place): known.get(prefix + place, {}) for place in theirs}
    return Renamed(state, prefix, by_order)


def _same_names(name: str) -> str:
    """A name in which layers are called alike whatever norm they are."""
    return _NORM_NAME.sub(r'norm\1', name)


def is_repeated(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> bool:
    """Whether a file holds several parts of a model's names, as a network holds its blocks."""
    counts = _prefixes(own, loaded)
    return list(counts.values()).count(max(counts.values())) > 1


def _for_parts(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A file of a part of the model with every prefix under which the model has that part."""
    counts = _prefixes(loaded, own)
    most = max(counts.values())
    parts = [prefix for prefix, count in counts.items() if count == most]
    # What is there more than twice (teacher and student, an average) is a block; nobody said which.
    if most <= max(_prefixes(own, loaded).values()) or len(parts) > 2:
        return loaded
    expanded = OrderedDict((part + key, value) for part in parts for key, value in loaded.items())
    known = getattr(loaded, '_metadata', {})
    expanded._metadata = {part + place: known[place] for part in parts for place in known}
    return expanded


def _prefix(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str:
    """What stands before most of the model's names in the file."""
    counts = _prefixes(own, loaded)
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))


def _prefixes(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> Counter:
    """How many of the model's names stand behind each prefix in the file."""
    wanted = set(map(_same_names, own))
    counts = Counter({'': 0})
    for key in loaded:
        parts = _same_names(key).split('.')
        for i in range(len(parts)):
            if '.'.join(parts[i:]) in wanted:
                counts[''.join(f'{part}.' for part in key.split('.')[:i])] += 1
    return counts


def _shapes(entries: Mapping[str, Tensor]) -> tuple:
    """What has to agree: the channels of a norm, the shapes of everything else."""
    if norm_kind(entries):
        of_channels = entries.get('weight', entries.get('running_mean'))
        return ('norm', 0 if of_channels is None else of_channels.numel())
    return tuple(sorted((entry, tuple(value.shape)) for entry, value in entries.items()))


def _by_name(ours: Mapping[str, Mapping], theirs: Mapping[str, Mapping]) -> dict[str, str]:
    """Place of the model -> place of the file of the same name, whatever the shapes."""
    names: dict[str, list[str]] = {}
    for place in theirs:
        names.setdefault(_same_names(place), []).append(place)
    found = {}
    for place in ours:
        alike = (name for name in names.get(_same_names(place), []) if name not in ours)
        same = [place] if place in theirs else list(alike)
        if len(same) == 1:
            found[place] = same[0]
    return found


def _by_order(
    ours: Mapping[str, Mapping], theirs: Mapping[str, Mapping], found: dict[str, str]
) -> tuple[tuple[str, str], ...]:
    """Match what names left over, as pairs of the file's and the model's place.

    Names whose shapes differ are taken back from ``found`` if the order explains them.
    """
    fitting = {
        model for model, file in found.items() if _shapes(ours[model]) == _shapes(theirs[file])
    }
    taken = {found[model] for model in fitting}
    left = [place for place in ours if place not in fitting]
    over = [place for place in theirs if place not in taken]
    wanted = [_shapes(ours[place]) for place in left]
    # Without norm layers two heads may look alike by chance.
    if not any('norm' in shapes for shapes in wanted):
        return ()
    usable = [place for place in over if _shapes(theirs[place]) in wanted][: len(left)]
    if [_shapes(theirs[place]) for place in usable] != wanted:
        return ()
    for place in left:
        found.pop(place, None)
    return tuple(zip(usable, left, strict=True))


def key_differences(
    own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]
) -> tuple[list[str], list[str], dict[str, str]]:
    """Keys that a file lacks, that it has beyond a model's, and those of another shape: which.

    ``num_batches_tracked`` may be absent: files of the authors' release do not count batches. The
    shape of what a norm holds counts as the same when it differs in dimensions of size one: the
    release keeps (1, C, 1, 1).
    """
    missing = [key for key in own if key not in loaded and not key.endswith('num_batches_tracked')]
    unexpected = [key for key in loaded if key not in own]
    misshapen = {
        key: f'{key} is {list(loaded[key].shape)}, expected {list(value.shape)}'
        for key, value in own.items()
        if key in loaded and not _same_shape(value, loaded[key])
    }
    return missing, unexpected, misshapen


def check_match(
    own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: str
) -> tuple[str, ...]:
    """Account for every key of a backbone and of the file it is to be filled from.

    Left alone are the file's classifier and the stages that a shorter backbone does not have. Parts
    of the backbone of which the file has none, such as the offsets of deformable convolutions, are
    new and start as they are.

    ``loaded`` is in the names of the backbone.

    Returns:
        Keys of what is new.

    Raises:
        CheckpointError: One line that tells apart the wrong architecture, the wrong norm, missing,
            unexpected and misshapen keys.
    """
    stages = {key.split('.')[0] for key in own}
    loaded = {
        key: value
        for key, value in loaded.items()
        if not is_classifier(key)
        and not (re.match(r'layer[1-4]\.', key) and key.split('.')[0] not in stages)
    }
    missing, unexpected, misshapen = key_differences(own, loaded)
    new = _new_parts(missing, loaded)
    kinds = {
        'missing': [key for key in missing if key not in new],
        'unexpected': unexpected,
        'of another shape': list(misshapen.values()),
    }
    said = '; '.join(f'{what} {shown(keys)}' for what, keys in kinds.items() if keys)
    if said:
        raise CheckpointError(
            f'{path}: does not fill the backbone{_reason(own, loaded, path)}: {said}'
        )
    return new


def check_shortcuts(
    own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], prefix: str, path: str
) -> None:
    """Tell ResNets apart that differ in nothing but where their shortcuts stride.

    Those that pool first number their layers otherwise; every shape is the same, so the order of
    places would match them.

    ``loaded`` is in the file's own names, in which the model lies under ``prefix``.

    Raises:
        CheckpointError: If one pools and the other does not.
    """
    inside = {key.removeprefix(prefix): v for key, v in loaded.items() if key.startswith(prefix)}
    expected, got = describe(own), describe(inside)
    if expected.depth and got.depth and expected.avg_down != got.avg_down:
        raise CheckpointError(f'{path}: holds a {got}, expected a {expected}')


def _new_parts(missing: list[str], loaded: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Of the keys that a file lacks, those of modules whose name occurs nowhere in it."""
    known = {part for key in loaded for part in _same_names(key).split('.')[:-1]}
    return tuple(
        key
        for key in missing
        # Blocks and stages are numbered: one that the file lacks is missing, not new.
        if any(not p.isdigit() and p not in known for p in _same_names(key).split('.')[1:-1])
    )


def _same_shape(own: Tensor, loaded: Tensor) -> bool:
    if own.dim() > 1:  # a convolution
        return own.shape == loaded.shape
    return [size for size in own.shape if size != 1] == [size for size in loaded.shape if size != 1]


def _reason(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: str) -> str:
    """What is wrong as a whole, where it can be told."""
    expected, got = describe(own), describe(loaded)
    if expected.depth and not any(key.startswith('layer1.') for key in loaded):
        return ' (it holds no ResNet)'
    if _network(got) != _network(expected):
        return f' (it holds a {got}, expected a {expected})'
    if got.norm != expected.norm:
        advice = _ADVICE.get(got.norm, '') if expected.norm == 'SSN' else ''
        return f' (it holds {got.norm} layers, expected {expected.norm}{advice.format(path=path)})'
    return ''


def _network(layout: Layout) -> tuple:
    return layout.depth, layout.deep_stem, layout.avg_down
