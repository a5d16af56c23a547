"""What a state dict is: which ResNet, which norm layers, in whose names.

ResNets of torchvision, timm, mmpretrain, mmdet and mmseg and of the authors' SN and SSN releases
share most keys. What differs is the name of the norms (bn1 or sn1), the prefix ``backbone.``, the
classifier and the deep stem:

| origin | deep stem |
|---|---|
| mmdet, mmseg | ``stem.0`` conv, ``stem.1`` norm, ``stem.3``, ``stem.4``, ``stem.6``, ``stem.7`` |
| mmpretrain | ``stem.0.conv``, ``stem.0.bn``, ``stem.1.conv``, ... |
| timm | ``conv1.0`` conv, ``conv1.1`` norm, ``conv1.3``, ``conv1.4``, ``conv1.6``, ``bn1`` |

Where shortcuts pool before they convolve, the convolution is ``downsample.1``; in mmpretrain it
stays ``downsample.0`` in stages of stride one, which have nothing to pool.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ssn_plugin.errors import CheckpointError

_DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
# Classifiers: torchvision, timm and the releases; mmpretrain.
_CLASSIFIER = re.compile(r'^(fc|head\.fc)\.(weight|bias)$')
_BACKBONE = re.compile(r'^(conv1|(bn|sn|gn)1|stem|layer[1-4])\.')
# Of mmpretrain's ConvModules and timm's Sequential to the Sequential of mmdet and mmseg.
_DEEP_STEMS = (
    (re.compile(r'^stem\.(\d)\.conv\.'), lambda found: f'stem.{3 * int(found[1])}.'),
    (
        re.compile(r'^stem\.(\d)\.(?:bn|sn|gn)\.'),
        lambda found: f'stem.{3 * int(found[1]) + 1}.',
    ),
    (re.compile(r'^conv1\.(\d)\.'), lambda found: f'stem.{found[1]}.'),
)
_TIMM_LAST_STEM_NORM = re.compile(r'^(?:bn|sn|gn)1\.')


@dataclass(frozen=True)
class Layout:
    """What a backbone's state dict holds.

    Attributes:
        norm: 'SSN', 'SN', 'BN', 'GN' or 'none'.
        depth: 18, 34, 50, 101 or 152; None if the blocks are those of no ResNet known here.
        deep_stem: Whether the stem is three 3x3 convolutions.
        avg_down: Whether shortcuts pool before they convolve.
        norms: Names of the norm layers.
    """

    norm: str
    depth: int | None
    deep_stem: bool
    avg_down: bool
    norms: tuple[str, ...]

    def __str__(self) -> str:
        network = f'ResNet-{self.depth}' if self.depth else 'network that is no ResNet known here'
        variant = ['deep stem'] * self.deep_stem + ['average-pooled shortcuts'] * self.avg_down
        with_norms = f' with {self.norm}' if self.norm != 'none' else ' without norm layers'
        return network + with_norms + (f' ({", ".join(variant)})' if variant else '')


def is_classifier(key: str) -> bool:
    """Whether a key is of the classifier behind a backbone."""
    return _CLASSIFIER.match(key) is not None


def norm_layers(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of the norm layers of a state dict and what each is: 'SSN', 'SN', 'BN' or 'GN'."""
    found = {}
    for key, value in state.items():
        name, _, last = key.rpartition('.')
        if last == 'mean_weight':  # without affine parameters there is no weight
            found[name] = 'SSN' if f'{name}.mean_fixed' in state else 'SN'
        elif last != 'weight' or f'{name}.mean_weight' in state:
            continue
        elif f'{name}.running_mean' in state:
            found[name] = 'BN'
        elif value.dim() == 1:
            found[name] = 'GN'
    return found


def describe(state: Mapping[str, Tensor]) -> Layout:
    """Tell what a backbone's state dict holds; see :func:`backbone_of` for whole models.

    Args:
        state: State dict with keys such as ``layer1.0.conv1.weight``.

    Example:
        >>> import torch
        >>> from ssn_plugin.checkpoint.layout import describe
        >>> describe({'conv1.weight': torch.ones(8, 3, 7, 7)}).depth is None
        True
    """
    norms = norm_layers(state)
    places = (re.match(r'layer([1-4])\.(\d+)\.', key) for key in state)
    blocks = Counter(stage for stage, _ in {place.groups() for place in places if place})
    stages = tuple(blocks[str(stage)] for stage in range(1, 5))
    bottleneck = any(re.match(r'^layer[1-4]\.\d+\.conv3\.', key) for key in state)
    kinds = Counter(norms.values())
    return Layout(
        norm=kinds.most_common(1)[0][0] if kinds else 'none',
        depth=_DEPTHS.get((bottleneck, stages)),
        deep_stem=any(key.startswith('stem.') for key in state),
        avg_down=_pools_before(state, 'layer2.0.downsample'),
        norms=tuple(norms),
    )


def _pools_before(state: Mapping[str, Tensor], shortcut: str) -> bool:
    """Whether a shortcut is pool, convolution, norm and not convolution, norm."""
    return f'{shortcut}.2.weight' in state


def backbone_of(
    state: Mapping[str, Tensor], path: str
) -> tuple[OrderedDict[str, Tensor], tuple[str, ...]]:
    """The ResNet in a state dict, in the names of ``SSNResNet``, and the keys that are not of it.

    Norms become sn1, sn2, ..., a deep stem that of mmdet and mmseg; values are not touched.

    Args:
        state: State dict of a backbone, a classifier, a detector or a segmentor.
        path: Where it is from, for the error.

    Returns:
        The backbone's state dict, and the keys left out.

    Raises:
        CheckpointError: If there is no ResNet in it, or keys that belong to nothing known.
    """
    prefix = 'backbone.' if any(key.startswith('backbone.') for key in state) else ''
    found = OrderedDict()
    left_out, unknown = [], []
    for key, value in state.items():
        if not key.startswith(prefix) or is_classifier(key.removeprefix(prefix)):
            left_out.append(key)
        elif _BACKBONE.match(key.removeprefix(prefix)):
            found[key.removeprefix(prefix)] = value
        else:
            unknown.append(key)
    if not any(name.startswith('layer1.') for name in found):
        raise CheckpointError(f'{path}: holds no ResNet: its keys are {shown(list(state))}')
    if unknown:
        raise CheckpointError(f'{path}: holds keys that no ResNet has: {shown(unknown)}')
    names = our_names(found)
    return OrderedDict((names[key], value) for key, value in found.items()), tuple(left_out)


def our_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What each key of a ResNet's state dict is called in ``SSNResNet`` of mmdet and mmseg.

    Args:
        state: State dict of the backbone alone, of any origin.

    Example:
        >>> import torch
        >>> from ssn_plugin.checkpoint.layout import our_names
        >>> our_names({'layer1.0.bn1.weight': torch.ones(8)})
        {'layer1.0.bn1.weight': 'layer1.0.sn1.weight'}
    """
    pools = _pools_before(state, 'layer2.0.downsample')
    names = {}
    for key in state:
        shortcut, below, rest = key.partition('.downsample.')
        if below and pools and not _pools_before(state, shortcut + '.downsample'):
            # mmpretrain has no pool of stride one in its place.
            names[key] = f'{shortcut}{below}{int(rest[0]) + 1}{rest[1:]}'
        else:
            names[key] = _in_our_names(key, state)
    return names


def _in_our_names(name: str, state: Mapping[str, Tensor]) -> str:
    if 'conv1.0.weight' in state and _TIMM_LAST_STEM_NORM.match(name):
        return _TIMM_LAST_STEM_NORM.sub('stem.7.', name)
    for pattern, replacement in _DEEP_STEMS:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return re.sub(r'(^|\.)(?:bn|gn)(\d)\.', r'\1sn\2.', name)


def shown(names: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """The first names of a list, and how many more there are.

    Example:
        >>> from ssn_plugin.checkpoint.layout import shown
        >>> shown(['a', 'b', 'c', 'd', 'e'])
        'a, b, c and 2 more'
    """
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
