"""What a state dict is, in every set of names; and the backbone out of it, in ours."""

from collections import OrderedDict

import pytest
import torch
from backbones import (
    as_detector,
    as_mmpretrain,
    as_segmentor,
    as_timm,
    as_torchvision,
    batch_norm_network,
    build,
)
from released_files import layers, released_state
from torch import nn

from ssn_plugin import SN, SSN
from ssn_plugin.checkpoint.layout import backbone_of, describe, is_classifier, norm_layers, shown

NARROW = dict(base_channels=4, stem_channels=4)
DEEP = dict(deep_stem=True, stem_channels=8)
POOLED = dict(avg_down=True)
LAYOUTS = {
    'torchvision': (as_torchvision, dict(depth=50)),
    'torchvision 18': (as_torchvision, dict(depth=18)),
    'timm': (as_timm, dict(depth=50)),
    'timm c': (as_timm, dict(depth=50, **DEEP)),
    'timm d': (as_timm, dict(depth=50, **DEEP, **POOLED)),
    'timm 18 d': (as_timm, dict(depth=18, **DEEP, **POOLED)),
    'mmpretrain': (as_mmpretrain, dict(depth=18)),
    'mmpretrain V1c': (as_mmpretrain, dict(depth=50, **DEEP)),
    'mmpretrain V1d': (as_mmpretrain, dict(depth=50, **DEEP, **POOLED)),
    'mmdet': (as_detector, dict(depth=50)),
    'mmdet V1d': (as_detector, dict(depth=50, **DEEP, **POOLED)),
    'mmseg': (as_segmentor, dict(depth=50)),
    'mmseg V1c': (as_segmentor, dict(depth=50, **DEEP)),
    'backbone alone': (OrderedDict, dict(depth=34)),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_backbone_of_every_layout(layout):
    rename, kwargs = LAYOUTS[layout]
    state = batch_norm_network('mmdet', **NARROW | kwargs).state_dict()
    others = set(rename({}))
    backbone, left_out = backbone_of(rename(state))
    assert set(left_out) == others
    assert len(backbone) == len(state)
    assert all(a is b for a, b in zip(backbone.values(), state.values(), strict=True))
    found = describe(backbone)
    assert found.norm == 'BN'
    assert found.depth == kwargs['depth']
    assert found.deep_stem == kwargs.get('deep_stem', False)
    assert found.avg_down == kwargs.get('avg_down', False)
    assert set(found.norms) == {
        key.removesuffix('.running_var') for key in backbone if 'running_v' in key
    }


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
@pytest.mark.parametrize('norm', ['SSN', 'SN', 'BN', 'GN'])
def test_depth_and_norm_of_our_networks(depth, norm):
    cfg = dict(type=norm, num_groups=2) if norm == 'GN' else dict(type=norm)
    found = describe(build('mmdet', depth=depth, **NARROW, norm_cfg=cfg).state_dict())
    assert (found.norm, found.depth) == (norm, depth)
    assert str(found) == f'ResNet-{depth} with {norm}'


@pytest.mark.parametrize('kind', ['SSN', 'SN'])
@pytest.mark.parametrize('using_bn', [True, False])
def test_released_layouts(kind, using_bn):
    state = released_state(50, 4, kind, using_bn=using_bn)
    names = [name for name, shape in layers(50, 4) if len(shape) == 1]
    assert len(names) == 53
    assert norm_layers(state) == dict.fromkeys(names, kind)
    assert str(describe(state)) == f'ResNet-50 with {kind}'
    backbone, left_out = backbone_of(state)
    assert left_out == ('fc.weight', 'fc.bias')
    assert list(backbone) == [key for key in state if key not in left_out]


def test_words_for_variants():
    state = batch_norm_network('mmdet', depth=50, **NARROW | DEEP | POOLED).state_dict()
    assert str(describe(state)) == 'ResNet-50 with BN (deep stem, average-pooled shortcuts)'
    assert str(describe({'a': torch.ones(1)})) == (
        'network that is no ResNet known here without norm layers'
    )


def test_one_missing_key_does_not_change_what_a_network_is():
    state = released_state(50, 4)
    for key in ('layer1.0.conv1.weight', 'layer4.2.conv1.weight', 'layer2.0.downsample.0.weight'):
        assert str(describe({k: v for k, v in state.items() if k != key})) == 'ResNet-50 with SSN'


@pytest.mark.parametrize(
    ('key', 'expected'),
    [
        ('fc.weight', True),
        ('fc.bias', True),
        ('head.fc.weight', True),
        ('fc2.weight', False),
        ('layer1.fc.weight', False),
        ('fc.weight_v', False),
    ],
)
def test_classifier(key, expected):
    assert is_classifier(key) is expected


def test_norms_of_any_network():
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.PReLU(4), nn.Linear(4, 4),
        nn.BatchNorm1d(4, affine=False), SSN(4), SN(4, affine=False), nn.InstanceNorm2d(4),
    )  # fmt: skip
    one_of_three = 'LN, GN or IN'
    assert norm_layers(model.state_dict()) == {
        '0': 'BN', '1': one_of_three, '2': one_of_three, '5': 'BN', '6': 'SSN', '7': 'SN'
    }  # fmt: skip


def test_group_norms_have_their_name():
    one = {'weight': torch.ones(4), 'bias': torch.zeros(4)}
    names = ('neck.gn', 'layer1.0.gn1', 'layer1.0.downsample.1', 'head.norm', 'head.ln1')
    state = {f'{name}.{key}': value for name in names for key, value in one.items()}
    assert list(norm_layers(state).values()) == ['GN'] * 3 + ['LN, GN or IN'] * 2
    unnamed = {key: value for key, value in state.items() if '.gn' not in key}
    assert set(norm_layers(unnamed).values()) == {'LN, GN or IN'}


@pytest.mark.parametrize(
    ('names', 'expected'),
    [([], ''), (['a'], 'a'), (['a', 'b', 'c'], 'a, b, c'), (list('abcd'), 'a, b, c and 1 more')],
)
def test_shown(names, expected):
    assert shown(names) == expected
