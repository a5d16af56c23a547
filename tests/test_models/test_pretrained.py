"""Released files in SSNResNet: features of a plain float64 forward, every key accounted for."""

import copy
import logging
import os
import pickle
import re
from collections import OrderedDict

import pytest
import torch
from backbones import batch_norm_network, build, images, pretrained
from mmengine.model import BaseModel, PretrainedInit
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, Runner
from pickled_code import Marker
from plain_resnet import PlainResNet, relative_error, sn_ratios, ssn_ratios
from released_files import layers, released_checkpoint, released_file, released_state, save
from torch import nn

from ssn_plugin import SN, SSN, set_radius, undecided_layers
from ssn_plugin.checkpoint import release
from ssn_plugin.checkpoint.publish import publish_backbone
from ssn_plugin.errors import CheckpointError
from ssn_plugin.models.pretrained import _told_decided

# As the released weights were trained, and as the shipped transfer configs have it.
RELEASE = dict(type='SSN', correction=1, momentum=0.003)
# Frozen, half frozen, and on the way: (share of undecided ratios, radius).
STATES = [(0.0, 1.0), (0.6, 0.5), (1.0, 0.7), (1.0, 0.3), (1.0, 0.0)]
# Worst of all cases below as measured: 3e-14 in float64; in float32 2e-6 for ResNet-18 and 8e-6 for
# ResNet-50, whose layers pass rounding errors on.
FLOAT64, FLOAT32 = 1e-12, 1e-5


@pytest.fixture(params=['mmdet', 'mmseg'])
def framework(request):
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture
def file(tmp_path):
    return tmp_path / 'net.pth'


def loaded(framework, path, **kwargs):
    """An SSNResNet filled from a checkpoint."""
    model = build(framework, **dict(norm_cfg=RELEASE) | kwargs, init_cfg=pretrained(path))
    model.init_weights()
    return model


def message_of(framework, path, **kwargs) -> str:
    """The one line with which init_weights refuses a checkpoint."""
    model = build(framework, **dict(norm_cfg=RELEASE) | kwargs, init_cfg=pretrained(path))
    with pytest.raises(CheckpointError) as caught:
        model.init_weights()
    text = str(caught.value)
    assert '\n' not in text
    assert text.startswith(f'{path}: ')
    return text


def assert_filled(model, state):
    """Every tensor of the file is in the model, bit by bit."""
    own = model.state_dict()
    mine = {key for key in own if not key.endswith('num_batches_tracked')}
    assert mine == {key for key in state if not key.startswith('fc.')}
    for key in mine:
        assert torch.equal(own[key], state[key].reshape(own[key].shape)), key


def worst_error(model, plain, x, dtype, training):
    model = copy.deepcopy(model).to(dtype).train(training)
    with torch.no_grad():
        pairs = zip(model(x.to(dtype)), plain, strict=True)
    return max(relative_error(ours, theirs) for ours, theirs in pairs), model


# ---------------------------------------------------------------- features


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize(
    ('framework', 'undecided', 'radius'),
    [('mmdet', *state) for state in STATES] + [('mmseg', *STATES[0]), ('mmseg', *STATES[1])],
)
def test_features_of_a_released_file(framework, file, depth, undecided, radius):
    pytest.importorskip(framework)
    kwargs = dict(depth=depth, undecided=undecided, radius=radius, seed=depth)
    path = released_file(file, **kwargs)
    state = released_state(**kwargs)
    model = loaded(framework, path, depth=depth)
    x = images(4, 96)
    for training in (False, True):
        reference = PlainResNet(state, training=training)
        expected = reference(x)
        assert len(reference.running) == training * 2 * sum(
            len(s) == 1 for _, s in layers(depth, 8)
        )
        for dtype, limit in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
            error, after = worst_error(model, expected, x, dtype, training)
            assert error < limit
            own = after.state_dict()
            for key, value in reference.running.items():
                # A frozen layer that did not choose BN needs its running statistics no more.
                ratios = ssn_ratios(state, key.rpartition('.')[0])[key.endswith('var')]
                if ratios[-1] > 0:
                    assert relative_error(own[key], value.flatten()) < limit, key


@pytest.mark.slow
def test_features_at_full_width(file):
    path = released_file(file, depth=50, width=64)
    model = loaded('mmdet', path, depth=50, base_channels=64, stem_channels=64)
    x = images(1, 96)
    expected = PlainResNet(released_state(50, 64))(x)
    assert worst_error(model, expected, x, torch.float64, False)[0] < FLOAT64
    assert worst_error(model, expected, x, torch.float32, False)[0] < FLOAT32


def test_the_comparison_sees_the_details_of_the_release(file):
    """Biased variances, the usual stem pool or a caffe stride are no small differences."""
    path = released_file(file, depth=50)
    x = images(4, 96)
    expected = PlainResNet(released_state(50))(x)
    for kwargs in (
        dict(norm_cfg=dict(type='SSN')),
        dict(stem_padding=1),
        dict(style='caffe'),
    ):
        model = loaded('mmdet', path, depth=50, **kwargs)
        assert worst_error(model, expected, x, torch.float64, False)[0] > 1e-3


def test_ratios_on_the_circle_by_definition(framework, file):
    """Undecided layers lie on the simplex, at the radius or beyond, and nowhere nearer to z."""
    state = released_state(undecided=1.0, radius=0.6)
    model = loaded(framework, released_file(file, undecided=1.0, radius=0.6))
    points = torch.distributions.Dirichlet(torch.full((3,), 0.5)).sample((20000,))
    points = points[(points - 1 / 3).norm(dim=1) >= 0.6]
    assert len(points) > 1000
    for name, module in model.named_modules():
        if isinstance(module, SSN):
            for statistic in ('mean', 'var'):
                ratios = getattr(module, f'{statistic}_ratios')
                z = state[f'{name}.{statistic}_weight']
                assert ratios.min() >= 0
                assert ratios.sum() == pytest.approx(1, abs=1e-6)
                assert (ratios - 1 / 3).norm() >= 0.6 - 1e-6
                assert (ratios - z).norm() <= (points - z).norm(dim=1).min() + 1e-6


# ---------------------------------------------------------------- variants of the file


@pytest.mark.parametrize('legacy', [True, False], ids=['legacy', 'zip'])
@pytest.mark.parametrize('module', [True, False], ids=['module.', 'no prefix'])
@pytest.mark.parametrize('classifier', [True, False], ids=['fc', 'no fc'])
def test_a_released_file_loads_as_it_is(framework, file, legacy, module, classifier):
    state = released_state(undecided=0.3, radius=0.5)
    path = save(released_checkpoint(state, module, classifier), file, legacy)
    model = loaded(framework, path)
    assert_filled(model, state)
    fixed = [bool(module.mean_fixed) for module in model.modules() if isinstance(module, SSN)]
    assert 0 < sum(fixed) < len(fixed)
    assert {float(m.radius) for m in model.modules() if isinstance(m, SSN)} == {0.5}


@pytest.mark.parametrize('depth', [34, 101])
def test_other_depths(file, depth):
    assert_filled(
        loaded('mmdet', released_file(file, depth=depth, width=4), depth=depth, base_channels=4,
               stem_channels=4),
        released_state(depth, 4),
    )  # fmt: skip


@pytest.mark.parametrize('entry', ['state_dict', 'model', None])
def test_where_the_weights_lie(framework, file, entry):
    state = released_state()
    path = save(state if entry is None else {entry: state, 'epoch': 3, 'meta': None}, file)
    assert_filled(loaded(framework, path), state)


def test_every_way_to_ask_for_a_checkpoint(framework, file):
    state = released_state()
    path = released_file(file)
    for kwargs in (
        dict(init_cfg=[dict(type='Kaiming', layer='Conv2d'), pretrained(path)]),
        dict(init_cfg=dict(type=PretrainedInit, checkpoint=path)),
        dict(init_cfg=pretrained(path, map_location='cpu')),
        dict(pretrained=path),
    ):
        model = build(framework, norm_cfg=RELEASE, **kwargs)
        model.init_weights()
        assert_filled(model, state)
        broken = released_checkpoint(state)
        del broken['state_dict']['module.layer3.0.conv2.weight']
        save(broken, file)
        with pytest.raises(CheckpointError, match=r'missing layer3\.0\.conv2\.weight$'):
            build(framework, norm_cfg=RELEASE, **kwargs).init_weights()
        released_file(file)


@pytest.mark.parametrize('module', ['', 'module.'])
@pytest.mark.parametrize('prefix', ['backbone', 'backbone.'])
def test_backbone_of_a_detector_by_prefix(framework, file, module, prefix):
    state = released_state()
    detector = {
        f'{module}backbone.{key}': value for key, value in state.items() if key[:3] != 'fc.'
    }
    path = save({'state_dict': detector | {f'{module}neck.weight': torch.ones(1)}}, file)
    model = build(framework, norm_cfg=RELEASE, init_cfg=pretrained(path, prefix=prefix))
    model.init_weights()
    assert_filled(model, state)
    assert_filled(loaded(framework, path), state)  # without one it is found
    model = build(framework, norm_cfg=RELEASE, init_cfg=pretrained(path, prefix='teacher'))
    with pytest.raises(CheckpointError, match="holds nothing under prefix='teacher'"):
        model.init_weights()


def test_fewer_stages(framework, file):
    """Those that the backbone lacks are left out; within the others every key counts."""
    state = released_state()
    short = dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(0, 1, 2))
    model = loaded(framework, released_file(file), **short)
    assert_filled(model, {k: v for k, v in state.items() if not k.startswith('layer4.')})
    x = images(4, 96)
    error, _ = worst_error(model, PlainResNet(state)(x)[:3], x, torch.float64, False)
    assert error < FLOAT64
    del state['layer3.1.sn2.radius']
    save(released_checkpoint(state), file)
    assert message_of(framework, str(file), **short).endswith('missing layer3.1.sn2.radius')
    shorter = {k: v for k, v in released_state().items() if not k.startswith('layer4.')}
    save(released_checkpoint(shorter), file)
    assert 'missing layer4.0.conv1.weight' in message_of(framework, str(file))


def test_it_is_read_once_and_loaded_once(framework):
    """What is loaded is what was checked, not what a second look at the address brings."""
    state = released_state()
    reads = []

    def load(filename, map_location=None):
        reads.append(filename)
        return {'state_dict': state} if len(reads) == 1 else {'state_dict': {}}

    CheckpointLoader.register_scheme('test-once://', load)
    try:
        model = loaded(framework, 'test-once://net')
        assert_filled(model, state)
        with torch.no_grad():
            model.conv1.weight.zero_()
        model.init_weights()  # mmengine: has been called more than once
        assert model.conv1.weight.abs().max() == 0
        assert reads == ['test-once://net']
    finally:
        del CheckpointLoader._schemes['test-once://']


def test_the_log_tells_what_was_loaded(file, caplog, monkeypatch):
    path = released_file(file, undecided=0.6, radius=0.5)
    state = released_state(undecided=0.6, radius=0.5)
    said = []
    monkeypatch.setattr('ssn_plugin.models.resnet.print_log', lambda line, **_: said.append(line))
    model = loaded('mmdet', path)
    count = len([key for key in state if not key.startswith('fc.')])
    norms = [module for module in model.modules() if isinstance(module, SSN)]
    decided = sum(None not in norm.selected for norm in norms)
    assert 0 < decided < len(norms) == 20
    (line,) = said
    assert f'all {count} weights and buffers filled from {path}' in line
    assert 'ResNet-18 with SSN' in line
    assert f'{decided} of its 20 switchable layers are decided, the others are mixtures' in line


@pytest.mark.parametrize(
    ('decided', 'layers', 'told'),
    [
        (20, 20, '; 20 of its 20 switchable layers are decided'),
        (0, 20, '; its 20 switchable layers are mixtures'),
        (0, 0, ''),
    ],
)
def test_how_many_are_decided_in_words(decided, layers, told):
    assert _told_decided(decided, layers) == told


# ---------------------------------------------------------------- the selection stays


def selection_of(model):
    return {n: m.selected for n, m in model.named_modules() if isinstance(m, SSN)}


def test_the_pretrained_selection_stays_and_new_layers_are_decided(framework, file):
    backbone = loaded(framework, released_file(file))
    before = copy.deepcopy(backbone.state_dict())
    chosen = selection_of(backbone)
    assert {name for pair in chosen.values() for name in pair} == {'IN', 'LN', 'BN'}
    with DefaultScope.overwrite_default_scope(framework):
        neck = MODELS.build(
            dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=4,
                 norm_cfg=dict(type='SSN'))
        )  # fmt: skip
    model = nn.ModuleDict(dict(backbone=backbone, neck=neck)).train()
    assert all(name.startswith('neck.') for name in undecided_layers(model))
    assert len(undecided_layers(model)) == 8
    for radius in (0.0, 0.3, 0.6, 1.0):
        set_radius(model, radius)
        sum(y.square().mean() for y in neck(backbone(images()))).backward()
        assert selection_of(backbone) == chosen
    assert undecided_layers(model) == []
    for key, value in backbone.state_dict().items():
        if key.endswith(('_weight', '_fixed')):
            assert torch.equal(value, before[key]), key


class Classifier(BaseModel):
    """The backbone, a new SSN layer and a linear head."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.neck = nn.Sequential(nn.Conv2d(64, 8, 1), SSN(8))
        self.head = nn.Linear(8, 1)

    def forward(self, inputs, labels=None, mode='tensor'):
        outputs = self.head(self.neck(self.backbone(inputs)[-1]).relu().mean((2, 3)))[:, 0]
        return dict(loss=(outputs - labels).square().mean()) if mode == 'loss' else outputs


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A function that trains the toy classifier by mmengine's Runner; gives the runner back."""
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.visualization import Visualizer

    monkeypatch.setattr(Runner, '_log_env', lambda *_: None)  # asks compilers, for seconds
    x = images(4)
    data = [(image, torch.tensor(float(i))) for i, image in enumerate(x)]

    def train(init_cfg, **backbone):
        cfg = dict(type='SSNResNet', depth=18, base_channels=8, stem_channels=8, norm_eval=False,
                   norm_cfg=RELEASE, init_cfg=init_cfg) | backbone  # fmt: skip
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = Classifier(cfg)
        runner = Runner(
            model=model,
            work_dir=str(tmp_path / 'run'),
            train_dataloader=dict(
                dataset=data,
                batch_size=2,
                sampler=dict(type='InfiniteSampler', shuffle=False),
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=dict(by_epoch=False, max_iters=6),
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-3),
                constructor='SSNOptimWrapperConstructor',
            ),
            custom_hooks=[dict(type='SSNRadiusHook')],
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=1),
                checkpoint=dict(type='CheckpointHook', interval=6, by_epoch=False),
            ),
            log_processor=dict(by_epoch=False),
            experiment_name='pretrained',
            default_scope='mmengine',
        )
        runner.train()
        return runner

    yield train
    logging.shutdown()
    for manager in (MMLogger, MessageHub, Visualizer, DefaultScope):
        manager._instance_dict.clear()


def test_training_by_the_hook_decides_new_layers_alone(file, trained):
    pytest.importorskip('mmdet')
    state = released_state()
    model = trained(pretrained(released_file(file))).model
    assert undecided_layers(model) == []
    own = model.backbone.state_dict()
    for key in own:
        if key.endswith(('mean_weight', 'var_weight', '_fixed')):
            assert torch.equal(own[key], state[key].reshape(own[key].shape)), key
    # it did train
    assert not torch.equal(own['conv1.weight'], state['conv1.weight'])
    (name, *_) = (name for name, pair in selection_of(model.backbone).items() if pair[0] == 'BN')
    key = f'{name}.running_mean'
    assert not torch.equal(own[key], state[key].flatten())


def test_the_chain_from_training_to_a_published_backbone(tmp_path, trained):
    """What one training selected is what another one starts from, and keeps."""
    pytest.importorskip('mmdet')
    runner = trained(None)
    backbone = runner.model.backbone
    assert undecided_layers(backbone) == []
    done = publish_backbone(f'{runner.work_dir}/iter_6.pth', tmp_path / 'r18.pth')
    assert done.selection == selection_of(backbone)
    assert {key.split('.')[0] for key in done.left_out} == {'neck', 'head'}
    for framework in ('mmdet', 'mmseg'):
        model = loaded(framework, done.path)
        assert selection_of(model) == selection_of(backbone)
        for key, value in backbone.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize('norm', [dict(type='BN'), dict(type='GN', num_groups=4)])
def test_a_published_backbone_with_an_ordinary_norm(framework, file, norm, tmp_path):
    """The file calls its norms as SSNResNet does, the backbone bn1 or gn1."""
    trained = build(framework, norm_cfg=norm)
    for tensor in trained.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape))
    save({'state_dict': {f'backbone.{k}': v for k, v in trained.state_dict().items()}}, file)
    done = publish_backbone(file, tmp_path / 'r18.pth')
    model = loaded(framework, done.path, norm_cfg=norm)
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert 'missing sn1.mean_weight' in message_of(framework, done.path)
    other = dict(type='BN') if norm['type'] == 'GN' else dict(type='GN', num_groups=4)
    assert 'n1.running_mean' in message_of(framework, done.path, norm_cfg=other)


# ---------------------------------------------------------------- what is refused


def broken(change, **kwargs):
    """A released checkpoint whose state dict was changed."""
    state = released_state(**kwargs)
    change(state)
    return released_checkpoint(state)


def misshapen(key, value):
    return lambda state: state.__setitem__(key, value)


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (lambda s: s.pop('conv1.weight'), 'missing conv1.weight'),
        (lambda s: s.pop('layer4.1.sn2.mean_fixed'), 'layer4.1.sn2 is no whole SSN'),
        (lambda s: s.pop('layer2.0.downsample.1.running_var'), 'downsample.1.running_var'),
        (lambda s: s.pop('layer1.0.conv1.weight'), 'backbone: missing layer1.0.conv1.weight'),
        (misshapen('layer1.0.conv3.weight', torch.ones(1)), 'unexpected layer1.0.conv3.weight'),
        (misshapen('sn1.foo', torch.ones(1)), 'unexpected sn1.foo'),
        (misshapen('fc2.weight', torch.ones(1)), 'unexpected fc2.weight'),
        (
            misshapen('conv1.weight', torch.ones(8, 3, 3, 3)),
            'of another shape conv1.weight is [8, 3, 3, 3], expected [8, 3, 7, 7]',
        ),
        (misshapen('layer1.0.sn1.weight', torch.ones(1, 4, 1, 1)), 'is [1, 4, 1, 1], expected [8]'),
        (misshapen('sn1.mean_weight', torch.ones(2)), 'mean_weight [2]'),
        (misshapen('sn1.mean_fixed', torch.ones(3)), 'mean_fixed [3]'),
        # as many numbers, in dimensions that a norm may have and a convolution may not
        (
            misshapen('layer2.0.downsample.0.weight', torch.ones(16, 8)),
            'layer2.0.downsample.0.weight is [16, 8], expected [16, 8, 1, 1]',
        ),
        (misshapen('sn1.mean_weight', torch.full((3,), torch.nan)), 'expected a one-hot vector'),
    ],
)  # fmt: skip
def test_one_wrong_key(file, change, said):
    path = save(broken(change), file)
    assert said in message_of('mmdet', path)


NARROW = dict(base_channels=4, stem_channels=4)
# What the file holds: arguments of released_file, or its very content; the backbone; what is said.
OTHER_NETWORKS = {
    'R101 into R50': (dict(depth=101, width=4), dict(depth=50), 'ResNet-101 with SSN, expected'),
    'R50 into R101': (dict(depth=50, width=4), dict(depth=101), 'ResNet-50 with SSN, expected'),
    'R50 into R18': (dict(depth=50, width=4), dict(depth=18), 'ResNet-50 with SSN, expected'),
    'R18 into R50': (dict(depth=18, width=4), dict(depth=50), 'ResNet-18 with SSN, expected'),
    'R34 into R50': (dict(depth=34, width=4), dict(depth=50), 'ResNet-34 with SSN, expected'),
    'SN': (dict(kind='SN', width=4), dict(), "take it as 'sn2ssn://{path}'"),
    'SN without BN': (
        dict(kind='SN', width=4, using_bn=False),
        dict(norm_cfg=dict(type='SSN', normalizers=('IN', 'LN'))),
        "take it as 'sn2ssn://{path}'",
    ),
    'SSN into SN': (dict(width=4), dict(norm_cfg=dict(type='SN')), 'SSN layers, expected SN'),
    'SSN into BN': (dict(width=4), dict(norm_cfg=dict(type='BN')), 'SSN layers, expected BN'),
    'other width': (dict(width=8), dict(), 'of another shape conv1.weight'),
    'deep stem': (dict(width=4), dict(deep_stem=True), 'expected a ResNet-18 with SSN (deep stem'),
    'pooled': (dict(width=4), dict(avg_down=True), 'with SSN (average-pooled shortcuts)'),
    'BN': (
        lambda: batch_norm_network('mmdet', **NARROW).state_dict(),
        dict(),
        "take it as 'bn2ssn://{path}'",
    ),
    'no ResNet': (lambda: {'features.0.weight': torch.ones(2, 2)}, dict(), 'it holds no ResNet'),
    'no weights': (lambda: {'epoch': 3}, dict(), 'holds no state dict of weights'),
    'no tensors': (lambda: {'state_dict': {'conv1.weight': [1.0]}}, dict(), 'holds no state dict'),
    'empty dict': (lambda: {}, dict(), 'holds no state dict'),
    'no dict': (lambda: torch.ones(2), dict(), 'holds a Tensor, expected a dict'),
}


@pytest.mark.parametrize('case', OTHER_NETWORKS)
def test_another_network(file, case):
    content, backbone, said = OTHER_NETWORKS[case]
    path = save(content(), file) if callable(content) else released_file(file, **content)
    assert said.format(path=path) in message_of('mmseg', path, **NARROW | backbone)


def test_not_a_checkpoint(framework, file):
    path = str(file)
    file.write_text('<html>404</html>')
    assert message_of(framework, path).endswith(': not a checkpoint of torch')
    file.write_bytes(b'')
    assert 'truncated, or not a checkpoint of torch' in message_of(framework, path)
    file.unlink()
    assert f'no such file (looked for from {os.getcwd()})' in message_of(framework, path)
    file.mkdir()
    assert 'is a folder' in message_of(framework, path)


@pytest.mark.parametrize('legacy', [True, False], ids=['legacy', 'zip'])
@pytest.mark.parametrize('left', [0.02, 0.3, 0.9, 0.9999])
def test_truncated_file(framework, file, legacy, left):
    path = released_file(file, legacy)
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])
    assert 'truncated, or not a checkpoint of torch' in message_of(framework, path)


@pytest.mark.parametrize('legacy', [True, False], ids=['legacy', 'zip'])
def test_code_is_not_run(framework, file, tmp_path, legacy, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    checkpoint = released_checkpoint(released_state())
    checkpoint['extra'] = Marker(tmp_path / 'ran')
    path = save(checkpoint, file, legacy)
    text = message_of(framework, path)
    assert re.search(
        r'refused, because reading it would run code: it holds a pickled \w+\.system ', text
    )
    assert 'SSN_ALLOW_PICKLE=1' in text
    assert '--allow-pickle' in text
    assert not (tmp_path / 'ran').exists()
    assert os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1'
    monkeypatch.setenv('SSN_ALLOW_PICKLE', '1')
    assert_filled(loaded(framework, path), released_state())
    assert (tmp_path / 'ran').exists()


def test_code_outside_any_checkpoint_is_not_run(framework, file, tmp_path):
    file.write_bytes(pickle.dumps(Marker(tmp_path / 'ran'), protocol=2))
    assert 'it holds a pickled posix.system ' in message_of(framework, str(file))
    # Torch has no files of this protocol; the unpickler that stands in before 2.6 reads it.
    file.write_bytes(pickle.dumps(Marker(tmp_path / 'ran')))
    said = message_of(framework, str(file))
    assert re.search('not a checkpoint of torch|it holds a pickled posix.system ', said)
    assert not (tmp_path / 'ran').exists()


def test_a_wish_for_weights_only_is_no_obstacle(framework, file, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    assert_filled(loaded(framework, released_file(file)), released_state())
    assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1'
    assert 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' not in os.environ


def test_another_file_under_the_released_name(framework, tmp_path):
    path = released_file(tmp_path / 'ssn_8x2_75.848.pth')
    text = message_of(framework, path)
    assert re.search(r'MD5 is [0-9a-f]{32}, but the released ssn_8x2_75\.848\.pth has', text)
    assert 'dadb0f1a0c49c31aedd6cb83d4996a03' in text


def test_the_released_file_under_its_name(framework, tmp_path, monkeypatch):
    """With the sum of the file made here in place of the sum of the file that cannot be had."""
    path = released_file(tmp_path / 'ssn_8x2_75.848.pth')
    known = {release.md5_of(path): release.Release((8, 2), 75.85, 'ssn_8x2_75.848.pth')}
    monkeypatch.setattr(release, 'RELEASES', known)
    assert_filled(loaded(framework, path), released_state())


def test_nothing_is_loaded_from_a_refused_file(framework, file):
    path = save(broken(lambda state: state.pop('layer4.1.sn2.radius')), file)
    model = build(framework, norm_cfg=RELEASE, init_cfg=pretrained(path))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError):
        model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- SN


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('using_bn', [True, False], ids=['IN LN BN', 'IN LN'])
@pytest.mark.parametrize('target', ['SN', 'SSN'])
def test_released_sn(framework, file, depth, using_bn, target):
    """Into SN as it is, into SSN by sn2ssn://; both compute what SN computes."""
    kwargs = dict(depth=depth, kind='SN', using_bn=using_bn)
    path, state = released_file(file, **kwargs), released_state(**kwargs)
    norm = dict(RELEASE, type=target, normalizers=('IN', 'LN', 'BN') if using_bn else ('IN', 'LN'))
    model = loaded(
        framework, path if target == 'SN' else f'sn2ssn://{path}', depth=depth, norm_cfg=norm
    )
    if target == 'SN':
        assert_filled(model, state)
    kind = SN if target == 'SN' else SSN
    for name, module in model.named_modules():
        if isinstance(module, kind):
            for ratios, expected in zip(
                (module.mean_ratios, module.var_ratios), sn_ratios(state, name), strict=True
            ):
                assert (ratios - expected).abs().max() < 1e-6, name
            if target == 'SSN':
                assert module.selected == (None, None)
                assert (int(module.mean_fixed), float(module.radius)) == (0, 0.0)
    x = images(4, 96)
    for training in (False, True):
        expected = PlainResNet(state, sn_ratios, training)(x)
        # The ratios of SSN are stored in float32.
        limit = FLOAT64 if target == 'SN' else 1e-6
        assert worst_error(model, expected, x, torch.float64, training)[0] < limit
        assert worst_error(model, expected, x, torch.float32, training)[0] < FLOAT32


def test_radius_acts_on_what_came_from_sn(framework, file):
    model = loaded(framework, f'sn2ssn://{released_file(file, kind="SN")}')
    assert len(undecided_layers(model)) == 20
    largest = {
        name: tuple(
            module.normalizers[int(z.argmax())] for z in (module.mean_weight, module.var_weight)
        )
        for name, module in model.named_modules()
        if isinstance(module, SSN)
    }
    set_radius(model, 1.0)
    assert selection_of(model) == largest


@pytest.mark.parametrize('content', ['SSN', 'BN', 'none'])
def test_sn2ssn_of_something_else(framework, file, content):
    if content == 'SSN':
        path = released_file(file)
    elif content == 'BN':
        path = save(batch_norm_network('mmdet').state_dict(), file)
    else:
        path = save(OrderedDict({'a.weight': torch.ones(2, 2)}), file)
    model = build(framework, init_cfg=pretrained(f'sn2ssn://{path}'))
    with pytest.raises(CheckpointError) as caught:
        model.init_weights()
    said = f'holds {"no norm" if content == "none" else content} layers, expected SN layers'
    assert str(caught.value).startswith(f'{path}: {said}')
