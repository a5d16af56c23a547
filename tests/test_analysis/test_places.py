"""Stages and kinds of the layers of real models."""

from collections import Counter

import pytest
from mmengine.registry import init_default_scope

from ssn_plugin.analysis.layer_ratios import layer_ratios
from ssn_plugin.analysis.places import place_of
from ssn_plugin.jobs.configs import load_config


@pytest.mark.parametrize(
    ('layer', 'place'),
    [
        ('sn1', ('stem', 'stem', 'sn1')),
        ('backbone.stem.4', ('stem', 'stem', 'stem.4')),
        ('layer4.22.sn3', ('layer4', 'residual', '22.sn3')),
        ('backbone.layer1.0.downsample.1', ('layer1', 'shortcut', '0.downsample.1')),
        ('neck.fpn_convs.0.sn', ('neck', 'FPN', 'fpn_convs.0.sn')),
        ('roi_head.bbox_head.2.shared_convs.0.sn', ('bbox_head', 'head', '2.shared_convs.0.sn')),
        ('rpn_head.rpn_conv.sn', ('rpn_head', 'head', 'rpn_conv.sn')),
        ('norm1', ('stem', 'stem', 'norm1')),
        ('3', ('other', 'other', '3')),
        ('backbone.stem.conv.sn', ('stem', 'stem', 'stem.conv.sn')),
        ('backbone.stage3.1.blocks.0.sn', ('stage3', 'other', '1.blocks.0.sn')),
        ('encoder.norm', ('other', 'other', 'encoder.norm')),
        ('', ('other', 'other', '')),
    ],
)
def test_places(layer, place):
    assert place_of(layer) == place


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        (
            'configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py',
            dict(stem=1, residual=16, shortcut=3, FPN=8, head=8),
        ),
        (
            'configs/demo/deeplabv3plus_r18-d8_ssn-all_demo.py',
            dict(stem=1, residual=16, shortcut=3, head=15),
        ),
    ],
)
def test_every_layer_of_the_demos_has_its_place(config, expected):
    if 'mask-rcnn' in config:
        pytest.importorskip('mmdet')
    config = load_config(config)
    init_default_scope(config.default_scope)
    if config.default_scope == 'mmdet':
        from mmdet.registry import MODELS
    else:
        from mmseg.registry import MODELS
    rows = layer_ratios(MODELS.build(config.model))
    assert Counter(row.place.kind for row in rows) == expected
    # Stages do not mix: in the order of the modules each is one piece.
    stages = [row.place.stage for row in rows]
    pieces = [a for a, b in zip(stages, [*stages[1:], None], strict=True) if a != b]
    assert len(pieces) == len(set(stages))
