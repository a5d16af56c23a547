"""What a state dict is: which norm layers it has, and which ResNet it is of, if it is of one."""

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
# What holds a weight and a bias for each channel and nothing else.
_UNTRACKED = 'LN, GN or IN'
_GROUP_NORM = re.compile(r'(?:^|\.)gn\d*$')
# Of torchvision, timm and the releases; of mmpretrain.
_CLASSIFIER = re.compile(r'^(fc|head\.fc)\.(weight|bias)$')


@dataclass(frozen=True)
class Layout:
    """What a backbone's state dict holds.

    Attributes:
        norm: As of :func:`norm_layers`, or 'none'.
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


def norm_kind(entries: Mapping[str, Tensor]) -> str | None:
    """What norm a module is that holds these entries: 'SSN', 'SN', 'BN' or 'LN, GN or IN'.

    None for others. What LayerNorm, GroupNorm and InstanceNorm hold is the same.
    """
    if 'mean_weight' in entries:  # without affine parameters there is no weight
        return 'SSN' if 'mean_fixed' in entries else 'SN'
    if 'running_mean' in entries or 'running_var' in entries:
        return 'BN'
    alone = entries.keys() == {'weight', 'bias'}
    return _UNTRACKED if alone and all(v.dim() == 1 for v in entries.values()) else None


def check_switchable(state: Mapping[str, Tensor], path: str) -> None:
    """See that every SSN and SN layer of a state dict is whole.

    Raises:
        CheckpointError: If one lacks something, has control parameters of different sizes, or a
            radius that is none.
    """
    for name, entries in places_of(state).items():
        sizes = [entries[key].numel() for key in ('mean_weight', 'var_weight') if key in entries]
        fixed = [entries[key].numel() for key in ('mean_fixed', 'var_fixed') if key in entries]
        radius = entries['radius'].numel() if sizes and 'radius' in entries else 1
        if sizes and (
            len(sizes) != 2
            or sizes[0] != sizes[1]
            or min(sizes) < 2
            or fixed not in ([], [1, 1])
            or radius != 1
        ):
            held = ', '.join(f'{key} {list(value.shape)}' for key, value in entries.items())
            raise CheckpointError(f'{path}: {name or "it"} is no whole SSN or SN layer: {held}')
        if sizes and 'radius' in entries and not float(entries['radius']) >= 0:
            raise CheckpointError(
                f'{path}: {name or "it"} has the radius {float(entries["radius"])}, expected at '
                'least 0'
            )


def norm_layers(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of the norm layers of a state dict and what each is, of :func:`norm_kind`.

    A name can tell more: what is called gn1, and the shortcuts of a network that has such, are GN.
    """
    kinds = {name: norm_kind(entries) for name, entries in places_of(state).items()}
    groups = {name for name in kinds if _GROUP_NORM.search(name)}
    if groups:
        groups |= {name for name in kinds if re.search(r'\.downsample\.\d+$', name)}
    return {
        name: 'GN' if kind == _UNTRACKED and name in groups else kind
        for name, kind in kinds.items()
        if kind
    }


def places_of(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Name of every module that holds something itself -> what it holds."""
    places: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        place, _, entry = key.rpartition('.')
        places.setdefault(place, {})[entry] = value
    return places


def describe(state: Mapping[str, Tensor]) -> Layout:
    """Tell what a backbone's state dict holds; see :func:`backbone_of` for whole models.

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
        # mmdet, mmseg and mmpretrain; timm
        deep_stem=any(key.startswith(('stem.', 'conv1.0.')) for key in state),
        # pool, convolution, norm and not convolution, norm
        avg_down='layer2.0.downsample.2.weight' in state,
        norms=tuple(norms),
    )


def backbone_of(
    state: Mapping[str, Tensor],
) -> tuple[OrderedDict[str, Tensor], tuple[str, ...]]:
    """The backbone in the state dict of a backbone or a whole model, and the keys outside of it.

    Returns:
        What stands under ``backbone.``, without that prefix; without one all but the classifier.
    """
    prefix = 'backbone.' if any(key.startswith('backbone.') for key in state) else ''
    found, left_out = OrderedDict(), []
    for key, value in state.items():
        if key.startswith(prefix) and not is_classifier(key.removeprefix(prefix)):
            found[key.removeprefix(prefix)] = value
        else:
            left_out.append(key)
    record = getattr(state, '_metadata', {})  # what layers note of themselves
    found._metadata = {
        name.removeprefix(prefix): record[name] for name in record if name.startswith(prefix)
    }
    return found, tuple(left_out)


def shown(names: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """The first names of a list, and how many more there are.

    Example:
        >>> from ssn_plugin.checkpoint.layout import shown
        >>> shown(['a', 'b', 'c', 'd', 'e'])
        'a, b, c and 2 more'
    """
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
