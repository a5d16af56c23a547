"""Where in a network a layer is, told by its name: stage, kind, and a label within the stage."""

import re
from typing import NamedTuple

_STEM = re.compile(r'^(?:backbone\.)?(stem\..+|(?:sn|bn|gn|norm)?\d)$')
_STAGE = re.compile(r'^(?:backbone\.)?((?:layer|stage)\d)\.(.+)$')
_HEAD = re.compile(r'^(?:.*\.)?(\w*head)\.(.+)$')


class Place(NamedTuple):
    """Where a layer is.

    Attributes:
        stage: 'stem', 'layer1', 'layer2', ... or 'stage1', ..., 'neck', the name of a head, or
            'other'.
        kind: 'stem', 'residual', 'shortcut', 'FPN', 'head' or 'other'.
        label: Name of the layer within its stage.
    """

    stage: str
    kind: str
    label: str


def place_of(layer: str) -> Place:
    """Place of a layer in a ResNet, or in a detector, segmentor or classifier with one.

    Example:
        >>> from ssn_plugin.analysis.places import place_of
        >>> place_of('backbone.layer2.0.downsample.1')
        Place(stage='layer2', kind='shortcut', label='0.downsample.1')
        >>> place_of('roi_head.bbox_head.shared_convs.0.sn')[:2]
        ('bbox_head', 'head')
    """
    if found := _STAGE.match(layer):
        kind = 'residual' if found[1].startswith('layer') else 'other'
        return Place(found[1], 'shortcut' if '.downsample.' in layer else kind, found[2])
    if found := _HEAD.match(layer):
        return Place(found[1], 'head', found[2])
    if layer.startswith('neck.'):
        return Place('neck', 'FPN', layer.removeprefix('neck.'))
    if (found := _STEM.match(layer)) and not layer.isdigit():
        return Place('stem', 'stem', found[1])
    return Place('other', 'other', layer)
