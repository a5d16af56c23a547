"""BatchNorm weights of every layout as SSN: the network they were, run beside it."""

import math
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from backbones import (
    as_conv_modules,
    as_detector,
    as_mmpretrain,
    as_segmentor,
    as_timm,
    as_torchvision,
    batch_norm_network,
    build,
    images,
    pretrained,
)
from plain_resnet import relative_error, sn_ratios
from released_files import released_file, released_state, save
from torch import nn

from ssn_plugin import SSN, set_radius
from ssn_plugin.checkpoint.warm_start import batch_norm_to_ssn, switch_norm_to_ssn
from ssn_plugin.errors import CheckpointError

DEEP = dict(deep_stem=True, stem_channels=8)
POOLED = dict(avg_down=True)
LAYOUTS = {
    'torchvision': ('mmdet', as_torchvision, dict(depth=50)),
    'torchvision 18': ('mmseg', as_torchvision, dict(depth=18)),
    'timm': ('mmdet', as_timm, dict(depth=50)),
    'timm c': ('mmseg', as_timm, dict(depth=50, **DEEP)),
    'timm d': ('mmdet', as_timm, dict(depth=50, **DEEP, **POOLED)),
    'timm 18 d': ('mmseg', as_timm, dict(depth=18, **DEEP, **POOLED)),
    'mmaction2': ('mmdet', as_conv_modules, dict(depth=50)),
    'mmaction2 18': ('mmseg', as_conv_modules, dict(depth=18)),
    'mmpretrain': ('mmdet', as_mmpretrain, dict(depth=18)),
    'mmpretrain V1c': ('mmseg', as_mmpretrain, dict(depth=50, **DEEP)),
    'mmpretrain V1d': ('mmdet', as_mmpretrain, dict(depth=50, **DEEP, **POOLED)),
    'mmdet': ('mmdet', as_detector, dict(depth=50)),
    'mmdet caffe': ('mmdet', as_detector, dict(depth=50, style='caffe')),
    'mmdet V1d': ('mmdet', as_detector, dict(depth=50, **DEEP, **POOLED)),
    'mmseg dilated': (
        'mmseg',
        as_segmentor,
        dict(depth=50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    ),
    'mmseg V1c': ('mmseg', as_segmentor, dict(depth=50, **DEEP)),
    'backbone alone': ('mmseg', OrderedDict, dict(depth=34)),
    # what DistributedDataParallel adds
    'module.': ('mmdet', lambda s: {f'module.{k}': v for k, v in s.items()}, dict(depth=18)),
}


def of_file(state):
    """As a file is read: without ``module.``."""
    return OrderedDict((key.removeprefix('module.'), value) for key, value in state.items())


def norms_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SSN)}


def ssn_networks(framework, file, state, ratio=1, **kwargs):
    """SSNResNet and the stock ResNet with SSN, from one file of tools/warm_start.py."""
    path = save({'meta': {'bn_ratio': ratio}, 'state_dict': state}, file)
    for kind in ('SSNResNet', 'ResNet'):
        arguments = dict(kwargs, norm_cfg=dict(type='SSN'), init_cfg=pretrained(path))
        if kind == 'SSNResNet':
            arguments['stem_padding'] = 1
        model = build(framework, kind, **arguments)
        model.init_weights()
        model.eval()
        yield model


@pytest.mark.parametrize('layout', LAYOUTS)
def test_an_exact_copy_of_every_layout(tmp_path, layout):
    """Measured: at most 3e-6 of the largest output."""
    framework, rename, kwargs = LAYOUTS[layout]
    pytest.importorskip(framework)
    network = batch_norm_network(framework, **kwargs)
    state = batch_norm_to_ssn(of_file(rename(network.state_dict())), 'net.pth', 1, fix=True)
    x = images()
    with torch.no_grad():
        expected = network(x)
    for model in ssn_networks(framework, tmp_path / 'net.pth', state, **kwargs):
        for norm in norms_of(model).values():
            assert norm.selected == ('BN', 'BN')
            assert (int(norm.mean_fixed), int(norm.var_fixed)) == (1, 1)
        with torch.no_grad():
            outputs = model(x)
        for ours, theirs in zip(outputs, expected, strict=True):
            assert relative_error(ours, theirs.double()) < 1e-5
        # running statistics, affine parameters and counters as they were
        own = model.state_dict()
        for key, value in network.state_dict().items():
            key = '.'.join(f's{part[1:]}' if part[:2] == 'bn' else part for part in key.split('.'))
            assert torch.equal(own[key], value), key
        # and no radius takes it apart
        set_radius(model, 0.0)
        with torch.no_grad():
            again = model(x)
        assert all(map(torch.equal, again, outputs))


def test_the_comparison_sees_a_shifted_stem(tmp_path):
    network = batch_norm_network('mmdet', depth=50)
    path = save(batch_norm_to_ssn(network.state_dict(), 'net.pth', 1, fix=True), tmp_path / 'a.pth')
    model = build('mmdet', depth=50, init_cfg=pretrained(path), norm_cfg=dict(type='SSN'))
    model.init_weights()
    model.eval()
    with torch.no_grad():
        assert relative_error(model(images())[0], network(images())[0].double()) > 1e-2


def test_an_exact_copy_that_is_not_frozen_may_leave(tmp_path):
    network = batch_norm_network('mmdet')
    state = batch_norm_to_ssn(network.state_dict(), 'net.pth', 1)
    model = next(ssn_networks('mmdet', tmp_path / 'net.pth', state))
    for norm in norms_of(model).values():
        assert norm.mean_ratios.tolist() == norm.var_ratios.tolist() == [0, 0, 1]
        assert (int(norm.mean_fixed), int(norm.var_fixed)) == (0, 0)


@pytest.mark.parametrize('bn_ratio', [0.9, 0.5, 1 / 3, 0.1, 0.0, 1.0, 0, 1])
@pytest.mark.parametrize(
    'normalizers', [('IN', 'LN', 'BN'), ('BN', 'IN'), ('LN', 'BN'), ('GN', 'BN', 'IN', 'LN')]
)
def test_importance_ratios(bn_ratio, normalizers):
    """The asked one for BN, the rest shared, for mean and variance, whatever the place of BN."""
    state = batch_norm_network('mmdet').state_dict()
    converted = batch_norm_to_ssn(state, 'net.pth', bn_ratio, normalizers=normalizers)
    cfg = dict(type='SSN', normalizers=normalizers, num_groups=2)
    model = build('mmdet', stem_padding=1, norm_cfg=cfg)
    model.load_state_dict(converted, strict=True)
    rest = (1 - bn_ratio) / (len(normalizers) - 1)
    expected = torch.tensor([bn_ratio if name == 'BN' else rest for name in normalizers])
    norms = norms_of(model)
    assert len(norms) == 20
    for norm in norms.values():
        torch.testing.assert_close(norm.mean_ratios, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(norm.var_ratios, expected, rtol=0, atol=1e-6)
        assert float(norm.radius) == 0
        assert (int(norm.mean_fixed), int(norm.var_fixed)) == (0, 0)


def test_nine_tenths_by_default():
    state = batch_norm_network('mmdet').state_dict()
    converted = batch_norm_to_ssn(state, 'net.pth')
    for name in ('sn1', 'layer2.0.downsample.1', 'layer4.1.sn2'):
        for statistic in ('mean', 'var'):
            assert converted[f'{name}.{statistic}_weight'].tolist() == pytest.approx(
                [0.05, 0.05, 0.9]
            )
        ours, theirs = name.replace('sn', 'bn'), name
        for key in ('running_mean', 'running_var', 'weight', 'bias', 'num_batches_tracked'):
            assert torch.equal(converted[f'{theirs}.{key}'], state[f'{ours}.{key}'])


def test_at_nine_tenths_it_is_nearly_that_network(tmp_path):
    network = batch_norm_network('mmdet', depth=50)
    # statistics of the images that it is going to see
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    x = images(8)
    network(x)
    network.eval()
    with torch.no_grad():
        expected = network(x)[-1].double()
    errors = []
    for ratio in (0.5, 0.9, 0.99, 1.0):
        state = batch_norm_to_ssn(network.state_dict(), 'net.pth', ratio)
        model = next(ssn_networks('mmdet', tmp_path / 'net.pth', state, ratio, depth=50))
        with torch.no_grad():
            errors.append(relative_error(model(x)[-1], expected))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    assert errors[1] < 0.5


def test_layers_share_no_memory():
    converted = batch_norm_to_ssn(batch_norm_network('mmdet').state_dict(), 'net.pth')
    control = [
        value for key, value in converted.items() if key.endswith(('mean_weight', 'var_weight'))
    ]
    assert len({value.data_ptr() for value in control}) == len(control) == 40
    assert {value.dtype for key, value in converted.items() if key.endswith('_fixed')} == {
        torch.int64
    }


def test_the_input_is_left_as_it_is():
    state = as_detector(batch_norm_network('mmdet').state_dict())
    before = {key: value.clone() for key, value in state.items()}
    batch_norm_to_ssn(state, 'net.pth', 1, fix=True)
    assert list(state) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (dict(bn_ratio=1.1), 'bn_ratio: got 1.1, expected a number in'),
        (dict(bn_ratio=-0.1), 'bn_ratio: got -0.1'),
        (dict(bn_ratio=math.nan), 'bn_ratio: got nan'),
        (dict(bn_ratio=math.inf), 'bn_ratio: got inf'),
        (dict(bn_ratio='0.9'), "bn_ratio: got '0.9'"),
        (dict(bn_ratio=None), 'bn_ratio: got None'),
        (dict(bn_ratio=0.9, fix=True), 'fix: a ratio of 0.9 is not one-hot, expected bn_ratio=1'),
        (dict(bn_ratio=0, fix=True), 'fix: a ratio of 0 is not one-hot'),
        (dict(normalizers=('IN', 'LN')), "normalizers: got ('IN', 'LN'), expected 'BN' among them"),
        (dict(normalizers=('BN',)), "normalizers: got ('BN',), expected at least 2"),
        (dict(normalizers=('BN', 'BN')), 'expected at least 2 different names'),
        (dict(normalizers=('BN', 'XN')), 'expected names out of'),
        (dict(normalizers='BN'), "normalizers: got 'BN'"),
    ],
)
def test_invalid_arguments(arguments, said):
    arguments = dict(bn_ratio=0.9, fix=False, normalizers=('IN', 'LN', 'BN')) | arguments
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        batch_norm_to_ssn(norm_layers_of('BN'), 'net.pth', **arguments)
    assert '\n' not in str(caught.value)


def test_ratios_of_numpy_are_numbers():
    batch_norm_to_ssn(norm_layers_of('BN'), 'net.pth', np.float32(0.5), False, ('IN', 'BN'))


def norm_layers_of(kind):
    cfg = dict(type=kind, num_groups=2) if kind == 'GN' else dict(type=kind)
    return build('mmdet', norm_cfg=cfg).state_dict()


@pytest.mark.parametrize(
    ('state', 'said'),
    [
        (lambda: norm_layers_of('SSN'), 'holds SSN layers, expected BatchNorm'),
        (lambda: norm_layers_of('SN'), 'holds SN layers, expected BatchNorm'),
        (lambda: norm_layers_of('GN'), 'holds GN layers, expected BatchNorm'),
        (
            lambda: torch.nn.BatchNorm2d(4, track_running_stats=False).state_dict(prefix='a.'),
            'holds LN, GN or IN layers, expected BatchNorm layers with running statistics',
        ),
        (lambda: {'a.weight': torch.ones(2, 2)}, 'holds no norm layers'),
        (
            lambda: norm_layers_of('BN') | SSN(4).state_dict(prefix='neck.'),
            'holds BN and SSN layers, expected BatchNorm',
        ),
    ],
)
def test_no_network_with_batch_norm(state, said):
    with pytest.raises(CheckpointError) as caught:
        batch_norm_to_ssn(state(), 'net.pth')
    assert str(caught.value).startswith(f'net.pth: {said}')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('key', ['running_mean', 'running_var', 'weight', 'bias'])
def test_a_batch_norm_layer_without_one_of_its_tensors(key):
    """Half a layer must not become a file that lacks its control parameters."""
    state = norm_layers_of('BN')
    del state[f'layer2.0.bn1.{key}']
    with pytest.raises(CheckpointError, match=r'^net\.pth: ') as caught:
        batch_norm_to_ssn(state, 'net.pth')
    assert str(caught.value).endswith(f'lacks layer2.0.bn1.{key}')


# ---------------------------------------------------------------- SN


@pytest.mark.parametrize('using_bn', [True, False], ids=['IN LN BN', 'IN LN'])
def test_sn_becomes_ssn_of_the_same_ratios(using_bn):
    state = released_state(50, 4, 'SN', using_bn=using_bn)
    with torch.no_grad():
        for key, value in state.items():  # far apart and close together
            if key.endswith(('mean_weight', 'var_weight')):
                value *= 8 if 'layer3' in key else 1
    converted = switch_norm_to_ssn(state, 'net.pth')
    candidates = ('IN', 'LN', 'BN') if using_bn else ('IN', 'LN')
    model = build('mmdet', depth=50, base_channels=4, stem_channels=4,
                  norm_cfg=dict(type='SSN', normalizers=candidates))  # fmt: skip
    missing, unexpected = model.load_state_dict(converted, strict=False)
    assert unexpected == ['fc.weight', 'fc.bias']
    assert all(key.endswith('num_batches_tracked') for key in missing)
    norms = norms_of(model)
    assert len(norms) == 53
    for name, norm in norms.items():
        mean, var = sn_ratios(state, name)
        assert (norm.mean_ratios - mean).abs().max() < 1e-6
        assert (norm.var_ratios - var).abs().max() < 1e-6
        assert float(norm.radius) == 0
        assert norm.mean_ratios.sum() == pytest.approx(1, abs=1e-6)


def test_sn_of_a_detector():
    state = {f'backbone.{key}': value for key, value in released_state(kind='SN').items()}
    converted = switch_norm_to_ssn(state | {'neck.weight': torch.ones(1)}, 'net.pth')
    assert 'backbone.sn1.mean_fixed' in converted
    assert 'neck.weight' in converted


@pytest.mark.parametrize('kind', ['SSN', 'BN', 'GN'])
def test_no_network_with_sn(kind):
    with pytest.raises(CheckpointError) as caught:
        switch_norm_to_ssn(norm_layers_of(kind), 'net.pth')
    assert str(caught.value) == f'net.pth: holds {kind} layers, expected SN layers'


def test_a_released_sn_file_is_not_changed(tmp_path):
    path = released_file(tmp_path / 'sn.pth', kind='SN')
    before = (tmp_path / 'sn.pth').read_bytes()
    switch_norm_to_ssn(released_state(kind='SN'), path)
    assert (tmp_path / 'sn.pth').read_bytes() == before
