"""SSNResNet on mmpretrain: layout, stem, initialisation, norm_eval, frozen stages, equality."""

import re

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ssn_plugin import SN, SSN, set_radius

pytest.importorskip('mmpretrain')

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
CONTROL = ('mean_weight', 'var_weight', 'mean_fixed', 'var_fixed', 'mean_choice', 'var_choice')


def build(kind='SSNResNet', seed=0, **kwargs):
    """A narrow backbone with the outputs of all stages."""
    kwargs = dict(depth=18, base_channels=4, stem_channels=4, out_indices=(0, 1, 2, 3)) | kwargs
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(dict(type=kind, **kwargs))


def norms_of(model, kind=SSN):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))


def expected_norms(depth):
    names = ['sn1']
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            convs = 2 if depth < 50 else 3
            names += [f'layer{stage}.{block}.sn{i}' for i in range(1, convs + 1)]
        if depth >= 50 or stage > 1:
            names.append(f'layer{stage}.0.downsample.1')
    return set(names)


@pytest.mark.parametrize('depth', BLOCKS)
def test_layout_is_the_released_one(depth):
    model = build(depth=depth)
    assert type(model).__module__ == 'ssn_plugin.models.mmpretrain_resnet'
    assert isinstance(model, pytest.importorskip('mmpretrain.models').ResNet)
    assert set(norms_of(model)) == expected_norms(depth)
    assert not norms_of(model, nn.modules.batchnorm._BatchNorm)


def test_scope_decides_and_mmpretrain_is_found_without_one():
    cfg = dict(type='SSNResNet', depth=18, base_channels=4, stem_channels=4)
    module = type(MODELS.build(dict(cfg, _scope_='mmpretrain'))).__module__
    assert module == 'ssn_plugin.models.mmpretrain_resnet'


def test_out_indices_are_the_hosts():
    assert [tuple(y.shape) for y in build(out_indices=(3,))(images())] == [(2, 32, 2, 2)]


@pytest.mark.parametrize('deep_stem', [False, True])
@pytest.mark.parametrize(('size', 'pooled'), [(64, 16), (39, 10)])
def test_stem_pool_is_the_released_one(deep_stem, size, pooled):
    model = build(deep_stem=deep_stem).eval()
    entered = []
    model.layer1.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    x = images(size)
    model(x)
    if deep_stem:
        features = model.stem(x)
        assert set(norms_of(model.stem)) == {'0.sn', '1.sn', '2.sn'}
    else:
        features = F.relu(model.sn1(F.conv2d(x, model.conv1.weight, stride=2, padding=3)))
    expected = F.max_pool2d(features, kernel_size=3, stride=2, padding=0, ceil_mode=True)
    assert entered[0].shape[-2:] == (pooled, pooled)
    assert torch.equal(entered[0], expected)


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('kind', ['SSNResNet', 'ResNet'])
@pytest.mark.parametrize('zero', [False, True])
def test_initialisation(kind, depth, zero):
    model = build(kind, depth=depth, norm_cfg=dict(type='SSN'), zero_init_residual=zero)
    model.init_weights()
    last = 'sn2' if depth < 50 else 'sn3'
    for name, norm in norms_of(model).items():
        assert norm.weight.unique().tolist() == [float(not (zero and name.endswith(last)))], name
        assert norm.bias.abs().max() == 0
        assert norm.mean_weight.tolist() == norm.var_weight.tolist() == [0.0] * 3
        assert norm.running_var.unique() == 1
    # Kaiming: variance 2 / fan-out
    weight = build(depth=50, base_channels=64, stem_channels=64).conv1.weight
    model = build(depth=50, base_channels=64, stem_channels=64)
    model.init_weights()
    assert not torch.equal(model.conv1.weight, weight)
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)


@pytest.mark.parametrize('deep_stem', [False, True])
def test_norm_eval_and_train(deep_stem):
    model = build(norm_eval=True, deep_stem=deep_stem)
    assert model.train() is model  # mmpretrain's own returns None
    assert model.training
    assert not any(norm.training for norm in norms_of(model).values())
    model = build(norm_eval=False, deep_stem=deep_stem)
    assert model.train(True) is model
    assert all(norm.training for norm in norms_of(model).values())
    assert model.eval() is model
    assert not any(norm.training for norm in norms_of(model).values())
    sn = build(norm_eval=True, norm_cfg=dict(type='SN')).train()
    assert len(norms_of(sn, SN)) == 20
    assert not any(norm.training for norm in norms_of(sn, SN).values())


@pytest.mark.parametrize('deep_stem', [False, True])
@pytest.mark.parametrize('stages', [0, 2])
def test_frozen_stages_keep_their_ratios(stages, deep_stem):
    model = build(frozen_stages=stages, deep_stem=deep_stem).train()
    frozen = ('sn1', 'stem', *(f'layer{i}.' for i in range(1, stages + 1)))
    before = {name: norm.mean_ratios for name, norm in norms_of(model).items()}
    statistics = {name: norm.running_mean.clone() for name, norm in norms_of(model).items()}
    model(images())
    set_radius(model, 1.0)
    for name, norm in norms_of(model).items():
        is_frozen = name.startswith(frozen)
        assert norm.training is not is_frozen, name
        assert torch.equal(norm.running_mean, statistics[name]) is is_frozen, name
        assert torch.equal(norm.mean_ratios, before[name]) is is_frozen, name
        assert norm.weight.requires_grad is not is_frozen, name


@pytest.mark.parametrize(
    'variant',
    [
        dict(),
        dict(style='caffe', avg_down=True, deep_stem=True),
        dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    ],
)
def test_one_hot_bn_is_the_hosts_resnet_with_bn(variant):
    """Outputs, running statistics and gradients, in double precision, with the usual stem pool."""
    theirs = build('ResNet', depth=50, norm_cfg=dict(type='BN'), **variant).double()
    generator = torch.Generator().manual_seed(1)
    for tensor in theirs.state_dict().values():
        if tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    ours = build(depth=50, seed=9, stem_padding=1, **variant).double()

    def in_our_names(key):
        return '.'.join(part.replace('bn', 'sn') for part in key.split('.'))

    state = {in_our_names(key): value for key, value in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all(key.endswith((*CONTROL, 'radius')) for key in missing)
    set_radius(ours, 1.0)
    assert {norm.selected for norm in norms_of(ours).values()} == {('BN', 'BN')}
    x = images().double()
    for training in (False, True):
        ours.train(training)
        theirs.train(training)
        outputs, expected = ours(x), theirs(x)
        for our_output, their_output in zip(outputs, expected, strict=True):
            torch.testing.assert_close(our_output, their_output, rtol=1e-9, atol=1e-9)
    upstream = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in expected]
    torch.autograd.backward(outputs, upstream)
    torch.autograd.backward(expected, upstream)
    gradients = {in_our_names(name): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if name in gradients:
            torch.testing.assert_close(
                parameter.grad, gradients[name], rtol=1e-7, atol=1e-7, msg=name
            )
    buffers = dict(ours.named_buffers())
    for name, value in theirs.named_buffers():
        torch.testing.assert_close(buffers[in_our_names(name)], value, rtol=1e-9, atol=1e-9)


def in_names_of_mmdet(state):
    """There the layers of the stem are counted, and every shortcut that pools has a pool."""
    pools = 'layer2.0.downsample.2.weight' in state
    named = {}
    for key, value in state.items():
        key = re.sub(r'^stem\.(\d)\.conv\.', lambda found: f'stem.{3 * int(found[1])}.', key)
        key = re.sub(r'^stem\.(\d)\.sn\.', lambda found: f'stem.{3 * int(found[1]) + 1}.', key)
        place = key.partition('.downsample.')[0]
        if pools and place != key and f'{place}.downsample.2.weight' not in state:
            key = re.sub(r'(?<=downsample\.)\d', lambda found: str(int(found[0]) + 1), key)
        named[key] = value
    return named


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('names', ['mmdet', 'mmpretrain'])
@pytest.mark.parametrize('avg_down', [False, True])
def test_deep_stems_load_in_the_names_of_either_codebase(tmp_path, depth, names, avg_down):
    arguments = dict(depth=depth, deep_stem=True, avg_down=avg_down)
    source = build(seed=3, **arguments)
    for module in norms_of(source).values():
        torch.nn.init.normal_(module.weight)
    state = source.state_dict()
    if names == 'mmdet':
        state = in_names_of_mmdet(state)
        assert 'stem.0.weight' in state
        assert ('layer1.0.downsample.2.weight' in state) == (avg_down and depth == 50)
    path = tmp_path / 'deep.pth'
    torch.save(state, path)
    model = build(
        seed=4, init_cfg=dict(type='Pretrained', checkpoint=str(path)), **arguments
    ).eval()
    model.init_weights()
    for own, theirs in zip(model(images()), source.eval()(images()), strict=True):
        assert torch.equal(own, theirs)
