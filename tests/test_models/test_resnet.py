"""SSNResNet of mmdet and mmseg: layout, stem, norm_eval, frozen stages, equal to their ResNet."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ssn_plugin import SN, SSN, set_radius

PER_NORM = (
    'weight', 'bias', 'mean_weight', 'var_weight', 'running_mean', 'running_var',
    'mean_fixed', 'var_fixed', 'radius',
)  # fmt: skip
# What a state dict of ours holds beyond a released one; loading does not ask for it.
OURS = ('num_batches_tracked', 'mean_choice', 'var_choice')
BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the test networks are a few channels wide
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=['mmdet', 'mmseg'])
def framework(request):
    pytest.importorskip(request.param)
    return request.param


def build(framework, kind='SSNResNet', seed=0, **kwargs):
    """A narrow backbone, built in the scope of a codebase."""
    kwargs = dict(depth=18, base_channels=4, stem_channels=4) | kwargs
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(framework):
        return MODELS.build(dict(type=kind, **kwargs))


def randomize(model, seed=1):
    """Weights and running statistics of a network that has seen data."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith('running_mean') or (name.endswith('bias') and tensor.dim() == 1):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        elif tensor.dim() == 1 and name.endswith(('running_var', '.weight')):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model


def norms_of(model, kind=SSN):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def statistics_of(model):
    return {n: b.clone() for n, b in model.named_buffers() if 'running' in n or 'tracked' in n}


def images(size=64, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def in_our_names(key):
    """The key of a ResNet with BN as an SSNResNet has it."""
    return '.'.join(part.replace('bn', 'sn') for part in key.split('.'))


def backward(model):
    """Random gradients into every output, the same for every model."""
    outputs = model(images().to(model.layer1[0].conv1.weight.dtype))
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(output.shape, generator=generator) for output in outputs]
    torch.autograd.backward(outputs, [dy.to(outputs[0].dtype) for dy in upstream])


def released_layout(depth):
    """The keys of a released file by the words of its description, without fc."""
    convs = 2 if depth < 50 else 3
    norms = ['sn1']
    keys = {'conv1.weight'}
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            prefix = f'layer{stage}.{block}'
            keys |= {f'{prefix}.conv{i}.weight' for i in range(1, convs + 1)}
            norms += [f'{prefix}.sn{i}' for i in range(1, convs + 1)]
        if depth >= 50 or stage > 1:
            keys.add(f'layer{stage}.0.downsample.0.weight')
            norms.append(f'layer{stage}.0.downsample.1')
    return norms, keys | {f'{norm}.{name}' for norm in norms for name in PER_NORM}


# ---------------------------------------------------------------- building


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_layout_is_the_released_one(framework, depth):
    model = build(framework, depth=depth)
    norms, keys = released_layout(depth)
    assert type(model).__module__ == f'ssn_plugin.models.{framework}_resnet'
    assert set(norms_of(model)) == set(norms)
    assert not norms_of(model, nn.modules.batchnorm._BatchNorm)
    assert {key for key in model.state_dict() if not key.endswith(OURS)} == keys


def test_depth_50_has_53_norms(framework):
    assert len(norms_of(build(framework, depth=50))) == 53


def test_full_width_shapes(framework):
    model = build(framework, depth=50, base_channels=64, stem_channels=64)
    state = model.state_dict()
    assert state['conv1.weight'].shape == (64, 3, 7, 7)
    assert state['layer4.2.conv3.weight'].shape == (2048, 512, 1, 1)
    assert state['layer4.0.downsample.1.running_var'].shape == (2048,)


@pytest.mark.parametrize('module_prefix', ['', 'module.'])
def test_released_file_loads_as_it_is(framework, tmp_path, module_prefix):
    generator = torch.Generator().manual_seed(3)
    released = {}
    for key, value in build(framework, depth=50).state_dict().items():
        name = key.rsplit('.', 1)[-1]
        shape = tuple(value.shape)
        if key.endswith(OURS):
            continue
        if name in ('mean_fixed', 'var_fixed'):
            tensor = torch.ones(1, dtype=torch.int64)
        elif name in ('mean_weight', 'var_weight'):
            tensor = torch.eye(3)[torch.randint(3, (), generator=generator)]
        elif name == 'radius':
            tensor = torch.ones(1)
        elif name in ('running_mean', 'running_var'):
            tensor = torch.rand(1, *shape, 1, generator=generator)
        elif 'conv' in key or 'downsample.0' in key:
            tensor = torch.rand(shape, generator=generator)
        else:
            tensor = torch.rand(1, *shape, 1, 1, generator=generator)
        released[key] = tensor
    state_dict = {module_prefix + key: value for key, value in released.items()}
    state_dict |= {
        f'{module_prefix}fc.weight': torch.rand(9, 9),
        f'{module_prefix}fc.bias': torch.rand(9),
    }
    file = tmp_path / 'ssn.pth'
    torch.save(
        dict(epoch=100, model='resnetv1ssn50', state_dict=state_dict, best_prec1=76.0,
             optimizer={}, lr_scheduler={}),
        file,
    )  # fmt: skip
    model = build(framework, depth=50, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    model.init_weights()
    state = model.state_dict()
    for key, value in released.items():
        assert torch.equal(state[key], value.reshape(state[key].shape)), key
    chosen = set()
    for name, norm in norms_of(model).items():
        names = [norm.normalizers[released[f'{name}.{s}_weight'].argmax()] for s in ('mean', 'var')]
        assert norm.selected == tuple(names)
        chosen |= set(names)
    assert chosen == {'IN', 'LN', 'BN'}


def test_default_norm_is_ssn_and_another_can_be_given(framework):
    assert norms_of(build(framework))
    model = build(framework, norm_cfg=dict(type='SN', momentum=0.5))
    assert not norms_of(model)
    assert {norm.momentum for norm in norms_of(model, SN).values()} == {0.5}


def test_misspelt_argument_is_an_error(framework):
    with pytest.raises(TypeError, match='frozen_stage'):
        build(framework, frozen_stage=1)


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('kind', ['SSNResNet', 'ResNet'])
def test_zero_init_residual(framework, kind, depth):
    model = build(framework, kind, depth=depth, norm_cfg=dict(type='SSN'), zero_init_residual=True)
    model.init_weights()
    last = 'sn2' if depth < 50 else 'sn3'
    for name, norm in norms_of(model).items():
        is_last = name.endswith(last)
        assert norm.weight.unique().tolist() == [float(not is_last)], name
        assert norm.bias.abs().max() == 0
        assert norm.mean_weight.tolist() == norm.var_weight.tolist() == [0.0] * 3
    model = build(framework, kind, depth=depth, norm_cfg=dict(type='SSN'), zero_init_residual=False)
    model.init_weights()
    assert all((norm.weight == 1).all() for norm in norms_of(model).values())


# ---------------------------------------------------------------- scope


def test_scope_decides_the_codebase(framework):
    cfg = dict(type='SSNResNet', depth=18, base_channels=4, stem_channels=4)
    expected = f'ssn_plugin.models.{framework}_resnet'
    with DefaultScope.overwrite_default_scope(framework):
        assert type(MODELS.build(dict(cfg))).__module__ == expected
    # as configs of one codebase name parts of another
    assert type(MODELS.build(dict(cfg, _scope_=framework))).__module__ == expected


@pytest.mark.parametrize('scope', [None, 'mmengine', 'mmrotate'])
def test_a_scope_without_a_resnet_says_whose_is_built(scope, caplog):
    frameworks = ('mmdet', 'mmseg', 'mmpretrain', 'mmpose')
    taken = next((name for name in frameworks if find_spec(name)), None)
    if taken is None:
        pytest.skip('no framework')
    MMLogger.get_instance('scopes').addHandler(caplog.handler)
    assert type(build(scope)).__module__ == f'ssn_plugin.models.{taken}_resnet'
    told = [text for text in caplog.messages if text.startswith('SSNResNet:')]
    assert len(told) == (scope == 'mmrotate')
    assert all('mmrotate has none' in text and f'of {taken} is built' in text for text in told)


def test_mmpose_has_its_own_defaults():
    pytest.importorskip('mmpose.models.backbones')
    model = build('mmpose')
    assert type(model).__module__ == 'ssn_plugin.models.mmpose_resnet'
    assert not model.norm_eval
    assert len(norms_of(model)) == 20
    assert model.train().sn1.training


def test_isinstance_of_the_hosts_resnet(framework):
    resnet = pytest.importorskip(f'{framework}.models.backbones').ResNet
    assert isinstance(build(framework), resnet)


# ---------------------------------------------------------------- stem


@pytest.mark.parametrize('deep_stem', [False, True])
@pytest.mark.parametrize(('size', 'pooled'), [(64, 16), (66, 16), (32, 8), (39, 10)])
def test_stem_pool_is_the_released_one(framework, deep_stem, size, pooled):
    model = randomize(build(framework, deep_stem=deep_stem)).eval()
    entered = []
    model.layer1.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    x = images(size)
    model(x)
    if deep_stem:
        features = model.stem(x)
    else:
        features = F.conv2d(x, model.conv1.weight, stride=2, padding=3)
        features = F.relu(model.sn1(features))
    expected = F.max_pool2d(features, kernel_size=3, stride=2, padding=0, ceil_mode=True)
    assert entered[0].shape[-2:] == (pooled, pooled)
    assert torch.equal(entered[0], expected)
    # windows begin at pixel 0: with the usual padding of 1 the corner would see 2 x 2 pixels
    assert torch.equal(entered[0][..., 0, 0], features[..., :3, :3].amax((-1, -2)))


# ---------------------------------------------------------------- norm_eval, frozen stages


def test_norm_eval_reaches_ssn(framework):
    model = randomize(build(framework, norm_eval=True))
    assert model.train(True) is model
    assert model.training
    assert model.layer3[0].training
    assert not any(norm.training for norm in norms_of(model).values())
    before = statistics_of(model)
    trained = model(images())
    assert all(torch.equal(before[name], value) for name, value in statistics_of(model).items())
    assert all(map(torch.equal, trained, model.eval()(images())))
    # parameters and ratios are trained all the same
    assert all(parameter.requires_grad for parameter in model.parameters())
    set_radius(model, 1.0)
    assert all(norm.selected == ('BN', 'BN') for norm in norms_of(model).values())


@pytest.mark.parametrize('kind', ['SN', 'BN'])
def test_norm_eval_of_other_norms(framework, kind):
    model = build(framework, norm_eval=True, norm_cfg=dict(type=kind)).train()
    layers = norms_of(model, (SN, nn.BatchNorm2d))
    assert len(layers) == 20
    assert not any(layer.training for layer in layers.values())


def test_without_norm_eval_ssn_trains(framework):
    model = build(framework, norm_eval=False)
    assert model.train() is model
    assert all(norm.training for norm in norms_of(model).values())
    before = statistics_of(model)
    model(images())
    assert not any(torch.equal(before[name], value) for name, value in statistics_of(model).items())
    model.train(False)
    assert not any(norm.training for norm in norms_of(model).values())


def test_hosts_default_of_norm_eval():
    assert build('mmdet').norm_eval
    assert not build('mmseg').norm_eval


def is_frozen(name, stages):
    return name.startswith(('sn1', 'conv1', 'stem', *(f'layer{i}.' for i in range(1, stages + 1))))


@pytest.mark.parametrize('stages', [0, 1, 2])
@pytest.mark.parametrize('deep_stem', [False, True])
@pytest.mark.parametrize('kind', ['SSNResNet', 'ResNet'])
def test_frozen_stages(framework, kind, stages, deep_stem):
    model = build(
        framework, kind, frozen_stages=stages, norm_eval=False, deep_stem=deep_stem,
        norm_cfg=dict(type='SSN', radius=0.1),
    )  # fmt: skip
    randomize(model)
    with torch.no_grad():
        for norm in norms_of(model).values():
            norm.mean_weight.copy_(torch.tensor([0.5, 0.3, 0.2]))
            norm.var_weight.copy_(torch.tensor([0.2, 0.3, 0.5]))
    model.train()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not is_frozen(name, stages), name
    norms = norms_of(model)
    for name, norm in norms.items():
        assert norm.training is not is_frozen(name, stages), name
    before = {name: (norm.mean_ratios, norm.var_ratios) for name, norm in norms.items()}
    statistics = statistics_of(model)
    for radius in (0.3, 0.6, 1.0):
        set_radius(model, radius)
        sum(output.square().mean() for output in model(images())).backward()
    for name, norm in norms.items():
        if is_frozen(name, stages):
            assert torch.equal(norm.mean_ratios, before[name][0]), name
            assert torch.equal(norm.var_ratios, before[name][1]), name
            assert norm.radius == torch.tensor(0.1)
            assert norm.mean_weight.grad is None
            assert torch.equal(norm.running_mean, statistics[f'{name}.running_mean'])
            assert torch.equal(norm.running_var, statistics[f'{name}.running_var'])
        else:
            assert norm.selected == ('IN', 'BN'), name
            assert not torch.equal(norm.running_mean, statistics[f'{name}.running_mean']), name


def test_frozen_stages_stay_frozen_when_norm_eval_comes_with_them(framework):
    model = build(framework, frozen_stages=1, norm_eval=True)
    for _ in range(2):
        model.eval()
        model.train()
    assert not any(norm.training for norm in norms_of(model).values())
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert model.layer2.training
    assert not model.layer1.training


# ---------------------------------------------------------------- equal to the frameworks' ResNet


VARIANTS = [
    dict(),
    dict(style='caffe', avg_down=True, deep_stem=True),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    dict(num_stages=3, strides=(1, 2, 1), dilations=(1, 1, 2), out_indices=(1, 2)),
]
MMSEG_VARIANTS = [
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), multi_grid=(1, 2, 4)),
    dict(
        strides=(1, 2, 1, 1), dilations=(1, 1, 1, 2), multi_grid=(1, 2, 4), contract_dilation=True
    ),
]


@pytest.mark.parametrize(
    ('framework', 'variant'),
    [(framework, variant) for framework in ('mmdet', 'mmseg') for variant in VARIANTS]
    + [('mmseg', variant) for variant in MMSEG_VARIANTS],
)
def test_one_hot_bn_is_the_frameworks_resnet_with_bn(framework, variant):
    """Apart from the stem pool: outputs, running statistics and gradients, in double precision."""
    pytest.importorskip(framework)
    arguments = dict(depth=50, norm_eval=False, **variant)
    theirs = randomize(build(framework, 'ResNet', norm_cfg=dict(type='BN'), **arguments)).double()
    ours = build(framework, seed=9, **arguments).double()
    state = {in_our_names(key): value for key, value in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert unexpected == []
    control = ('mean_weight', 'var_weight', 'radius', 'mean_fixed', 'var_fixed', *OURS)
    assert all(key.endswith(control) for key in missing)
    set_radius(ours, 1.0)
    assert {norm.selected for norm in norms_of(ours).values()} == {('BN', 'BN')}
    x = images().double()
    for model in (ours, theirs):
        model.eval()
    assert [output.shape for output in ours(x)] == [output.shape for output in theirs(x)]
    assert not torch.allclose(ours(x)[0], theirs(x)[0])
    ours.maxpool = theirs.maxpool

    for training in (False, True):
        ours.train(training)
        theirs.train(training)
        for our_output, their_output in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(our_output, their_output, rtol=1e-9, atol=1e-9)
    our_statistics = statistics_of(ours)
    for name, value in statistics_of(theirs).items():
        torch.testing.assert_close(our_statistics[in_our_names(name)], value, rtol=1e-9, atol=1e-9)
    for model in (ours, theirs):
        backward(model)
    for name in ('layer1.0.conv1', 'layer2.1.conv2', 'layer3.0.conv3'):
        torch.testing.assert_close(
            ours.get_submodule(name).weight.grad,
            theirs.get_submodule(name).weight.grad,
            rtol=1e-7,
            atol=1e-7,
        )


def test_dilations_and_multi_grid_of_mmseg():
    """The dilation of every 3x3 convolution of the last stage, by hand."""
    pytest.importorskip('mmseg')

    def last_stage(**kwargs):
        model = build('mmseg', depth=50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), **kwargs)
        return [block.conv2.dilation[0] for block in model.layer4]

    assert last_stage() == [4, 4, 4]
    assert last_stage(contract_dilation=True) == [2, 4, 4]
    assert last_stage(multi_grid=(1, 2, 4)) == [1, 2, 4]
    dilated = build('mmseg', depth=50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)).eval()
    assert [tuple(output.shape[-2:]) for output in dilated(images())] == [(16, 16)] + [(8, 8)] * 3
    plain = build('mmseg', depth=50).eval()
    assert [output.shape[-1] for output in plain(images())] == [16, 8, 4, 2]


# ---------------------------------------------------------------- training


@pytest.mark.parametrize('depth', [18, 50])
def test_stock_resnet_with_ssn(framework, depth):
    model = build(framework, 'ResNet', depth=depth, norm_cfg=dict(type='SSN'), norm_eval=False)
    assert set(norms_of(model)) == set(released_layout(depth)[0])
    model.init_weights()
    model.train()
    train_two_steps(model)


def train_two_steps(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for radius in (0.2, 1.0):
        set_radius(model, radius)
        optimizer.zero_grad()
        backward(model)
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert all(None not in norm.selected for norm in norms_of(model).values())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_with_cp_trains_to_the_same_weights_and_statistics(framework):
    """Blocks are computed again in the backward pass instead of kept."""
    plain, checkpointed = (
        build(framework, depth=50, norm_eval=False, with_cp=with_cp).double().train()
        for with_cp in (False, True)
    )
    assert not plain.layer1[0].with_cp
    assert checkpointed.layer1[0].with_cp
    for model in (plain, checkpointed):
        train_two_steps(model)
    for (name, ours), theirs in zip(
        checkpointed.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        # Autograd adds the gradients of a block's branches in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)
    assert checkpointed.layer1[0].sn1.num_batches_tracked == 2
