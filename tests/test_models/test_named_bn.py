"""The norms that a ConvModule calls ``bn``, and the weights in names that go with them."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from released_files import released_file, released_state
from torch import nn

import ssn_plugin
from ssn_plugin.errors import CheckpointError

mmcv_cnn = pytest.importorskip('mmcv.cnn')


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('SSNNamedBN', ssn_plugin.SSN),
        ('SyncSSNNamedBN', ssn_plugin.SyncSSN),
        ('SNNamedBN', ssn_plugin.SN),
        ('GNNamedBN', nn.GroupNorm),
    ],
)
@pytest.mark.parametrize('dims', [2, 3])
def test_a_conv_module_calls_it_bn(name, kind, dims):
    conv_cfg = dict(type=f'Conv{dims}d')
    module = mmcv_cnn.ConvModule(
        3, 32, 3, conv_cfg=conv_cfg, norm_cfg=dict(type=name, eps=1e-3, requires_grad=False)
    )
    assert type(module.bn) is kind  # the layer itself: what asks for its type finds it
    assert module.bn.eps == 1e-3
    assert not module.bn.weight.requires_grad
    assert module(torch.randn(2, 3, *[6] * dims)).shape == (2, 32, *[4] * dims)


def test_arguments_reach_the_layer():
    layer = MODELS.build(dict(type='SSNNamedBN', num_features=8, normalizers=('IN', 'LN')))
    assert layer.normalizers == ('IN', 'LN')
    assert MODELS.build(dict(type='GNNamedBN', num_features=8, num_groups=2)).num_groups == 2
    with pytest.raises(TypeError, match='norms'):
        MODELS.build(dict(type='SSNNamedBN', num_features=8, norms=3))


def test_weights_in_names_and_shapes_of_torchvision(tmp_path):
    state = released_state()
    path = released_file(tmp_path / 'net.pth')
    found = CheckpointLoader.load_checkpoint(f'named_bn://{path}')['state_dict']
    twice = {key: found.pop(key) for key in list(found) if '.bn.' in key}
    assert len(found) == len([key for key in state if not key.startswith('fc.')])
    for key, value in found.items():
        theirs = state[key.replace('bn', 'sn')]
        assert torch.equal(value.flatten(), theirs.flatten()), key
    assert found['bn1.weight'].shape == found['bn1.running_var'].shape == (8,)
    assert found['layer2.0.downsample.1.bias'].shape == (16,)
    assert found['layer1.0.bn2.mean_fixed'].shape == found['layer1.0.bn2.radius'].shape == ()
    assert found['layer1.0.conv2.weight'].shape == (8, 8, 3, 3)
    assert not any('sn' in key for key in found)
    # What TSM does not rename: control parameters, radius and flags.
    assert len(twice) == 5 * 20
    assert twice['conv1.bn.radius'] is found['bn1.radius']
    assert twice['layer1.0.conv2.bn.mean_weight'] is found['layer1.0.bn2.mean_weight']
    name = 'layer2.0.downsample.{}.var_fixed'
    assert twice[name.format('bn')] is found[name.format(1)]


def test_conversions_one_after_the_other(tmp_path):
    layer = nn.BatchNorm2d(4).state_dict()
    layer['weight'] = torch.randn(4)
    state = {'layer1.0.conv1.weight': torch.randn(4, 4, 3, 3)}
    torch.save(state | {f'layer1.0.bn1.{k}': v for k, v in layer.items()}, tmp_path / 'bn.pth')
    address = f'named_bn://bn2ssn://{tmp_path / "bn.pth"}'
    found = CheckpointLoader.load_checkpoint(address)['state_dict']
    assert torch.equal(found['layer1.0.bn1.weight'], layer['weight'])
    torch.testing.assert_close(found['layer1.0.bn1.var_weight'], torch.tensor([0.05, 0.05, 0.9]))


def test_a_file_without_norms_is_refused(tmp_path):
    torch.save({'weight': torch.ones(1)}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='no norm layers'):
        CheckpointLoader.load_checkpoint(f'named_bn://{tmp_path / "other.pth"}')


def test_a_file_of_conv_modules(tmp_path):
    """mmaction2's networks: 2-D or 3-D convolutions under conv1.conv, norms under conv1.bn."""
    state = {'conv1.conv.weight': torch.randn(4, 4, 3, 3, 3)}
    layer = nn.BatchNorm3d(4).state_dict()
    torch.save(state | {f'conv1.bn.{k}': v for k, v in layer.items()}, tmp_path / 'b.pth')
    address = f'bn2ssn://{tmp_path / "b.pth"}'
    found = CheckpointLoader.load_checkpoint(f'named_bn://{address}')['state_dict']
    own = ssn_plugin.SSN(4).state_dict()
    assert {key.rpartition('.')[2] for key in found if '.bn.' in key} == set(own)
    cfg = dict(conv_cfg=dict(type='Conv3d'), norm_cfg=dict(type='SSNNamedBN'), bias=False)
    network = BaseModule(dict(type='Pretrained', checkpoint=address))
    network.conv1 = mmcv_cnn.ConvModule(4, 4, 3, **cfg)
    network.init_weights()
    assert network.conv1.bn.mean_ratios.tolist() == pytest.approx([0.05, 0.05, 0.9])
    assert torch.equal(network.conv1.conv.weight, state['conv1.conv.weight'])
