"""mmaction2: its networks, its ways to start from weights, and the Kinetics configs for real.

It needs mmaction2 1.2.0, which does not install beside the OneDL packages; how to make the
environment stands in docs/other-codebases.md.
"""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from released_files import released_file, released_state
from torch import nn

from ssn_plugin import SN, SSN, collapse_ssn, set_radius, undecided_layers

pytest.importorskip('mmaction.models')

ROOT = Path(__file__).parents[2]
KINETICS = sorted((ROOT / 'configs' / 'kinetics').glob('*.py'))
NAMED_BN = dict(type='SSNNamedBN')
PATHWAY = dict(type='resnet3d', depth=18, pretrained=None, conv1_kernel=(1, 7, 7))
NETWORKS = {
    'ResNet3d': (dict(depth=18, pretrained2d=False, conv1_kernel=(3, 7, 7)), 20),
    'ResNet3dSlowOnly': (
        dict(depth=18, lateral=False, conv1_kernel=(1, 7, 7), inflate=(0, 0, 1, 1)),
        20,
    ),
    'ResNet3dSlowFast': (
        dict(
            slow_pathway=dict(PATHWAY, lateral=True, inflate=(0, 0, 1, 1), norm_cfg=NAMED_BN),
            fast_pathway=dict(PATHWAY, lateral=False, base_channels=8, norm_cfg=NAMED_BN),
        ),
        41,
    ),
    'ResNet3dCSN': (dict(depth=50, pretrained2d=False, bottleneck_mode='ir'), 53),
    'ResNet2Plus1d': (
        dict(
            depth=18,
            pretrained2d=False,
            # It has a norm of its own between its two convolutions.
            conv_cfg=dict(type='Conv2plus1d', norm_cfg=NAMED_BN),
            inflate=(1, 1, 1, 1),
            conv1_kernel=(3, 7, 7),
        ),
        40,
    ),
    'X3D': (dict(gamma_w=1, gamma_b=2.25, gamma_d=2.2), 84),
    'C3D': (dict(style='pytorch'), 8),
    'ResNet': (dict(depth=18), 20),
    'ResNetTSM': (dict(depth=18, num_segments=2, pretrained2d=False), 20),
}
FLAT = ('ResNet', 'ResNetTSM')


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())
    init_default_scope('mmaction')
    MMLogger.get_instance('mmaction', log_level='WARNING')  # init_weights logs every parameter


def build(name: str, norm: str = 'SSNNamedBN', **options) -> nn.Module:
    settings = NETWORKS[name][0] | options
    if 'slow_pathway' not in settings:
        settings['norm_cfg'] = dict(type=norm) | ({'num_groups': 32} if norm == 'GN' else {})
    return MODELS.build(dict(type=name, **{'pretrained': None} | settings))


def layers(model: nn.Module) -> list[SSN]:
    return [module for module in model.modules() if isinstance(module, SSN)]


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_at_their_defaults(name):
    """Built, initialised, decided and collapsed."""
    model = build(name)
    model.init_weights()
    assert len(layers(model)) == NETWORKS[name][1]
    for parameter in model.parameters():
        if parameter.dim() == 1 and len(parameter) == 3:
            nn.init.normal_(parameter)
    set_radius(model, 1.0)
    assert undecided_layers(model) == []
    model.eval()
    if name != 'C3D':  # its fully connected layers are made for clips of 16 x 112 x 112
        clip = torch.randn(2, 3, 8, 32, 32) if name not in FLAT else torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            outputs = [m(clip) for m in (model, collapse_ssn(copy.deepcopy(model)))]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('norm', ['SSN3d', 'GN'])
def test_norms_of_another_name_fail_unless_nothing_starts_at_zero(norm):
    """What docs/other-codebases.md says of ``zero_init_residual``."""
    with pytest.raises(AttributeError, match="no attribute 'bn'"):
        build('ResNet3d', norm).init_weights()
    build('ResNet3d', norm, zero_init_residual=False).init_weights()


def test_blocks_start_at_zero():
    model = build('ResNet3d')
    model.init_weights()
    assert not model.layer1[0].conv2.bn.weight.any()
    assert model.layer1[0].conv1.bn.weight.all()


@pytest.mark.parametrize('name', ['ResNet3d', *FLAT])
def test_a_released_file_inflated_and_as_it_is(name, tmp_path):
    flat = name in FLAT
    width = 64 if flat else 8
    file = released_file(tmp_path / 'net.pth', width=width, undecided=0.3)
    options = {} if flat else dict(base_channels=width)
    if name != 'ResNet':
        options['pretrained2d'] = True
    model = build(name, pretrained=f'named_bn://{file}', **options)
    model.init_weights()
    state = released_state(width=width, undecided=0.3)
    norms = {key.rpartition('.')[0] for key in state if key.endswith('radius')}
    found = {n: m for n, m in model.named_modules() if isinstance(m, SSN)}
    assert len(norms) == len(found) == 20
    for theirs in norms:
        where = re.sub(r'sn(\d)$', r'conv\1', theirs).replace('downsample.1', 'downsample')
        layer = found[f'{where}.bn']
        for key in ('weight', 'running_var', 'mean_weight', 'mean_fixed', 'radius'):
            assert torch.equal(getattr(layer, key).flatten(), state[f'{theirs}.{key}'].flatten())
    conv = model.layer1[0].conv1.conv
    weight = (conv.net if name == 'ResNetTSM' else conv).weight
    if not flat:
        weight = weight.sum(2)
    torch.testing.assert_close(weight, state['layer1.0.conv1.weight'])
    set_radius(model, 0.1)
    # The file's choices; what is undecided in it may be decided by now.
    for theirs in norms:
        where = re.sub(r'sn(\d)$', r'conv\1', theirs).replace('downsample.1', 'downsample')
        for which, choice in zip(('mean', 'var'), found[f'{where}.bn'].selected, strict=True):
            if state[f'{theirs}.{which}_fixed']:
                index = int(state[f'{theirs}.{which}_weight'].argmax())
                assert choice == ('IN', 'LN', 'BN')[index]


def test_a_3d_file_with_batch_norm_fills_every_norm(tmp_path):
    source = build('ResNet3d', 'BN3d', base_channels=8)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    torch.save(source.state_dict(), tmp_path / 'bn.pth')
    address = f'named_bn://bn2ssn://{tmp_path / "bn.pth"}'
    model = build('ResNet3d', base_channels=8, pretrained=address)
    model.init_weights()
    norms = [module for module in source.modules() if isinstance(module, nn.BatchNorm3d)]
    for layer, norm in zip(layers(model), norms, strict=True):
        assert torch.equal(layer.weight, norm.weight)
        assert layer.mean_ratios[2] == pytest.approx(0.9)


def test_frozen_stages_keep_their_ratios():
    model = build('ResNet', frozen_stages=1)
    model.train()  # mmaction2's returns nothing
    set_radius(model, 1.0)
    frozen = [name.split('.')[0] for name in undecided_layers(model)]
    assert sorted(set(frozen)) == ['conv1', 'layer1']
    assert not model.conv1.bn.training


TSM = dict(type='ResNetTSM', depth=50, num_segments=4, pretrained=None, shift_div=8)
HEAD = dict(type='TSMHead', num_classes=5, in_channels=2048, num_segments=4)
# What docs/other-codebases.md writes for the rules of TSMOptimWrapperConstructor.
TSM_RULES = dict(
    bias_lr_mult=2,
    bias_decay_mult=0,
    norm_decay_mult=0,
    custom_keys={
        'fc_cls.weight': dict(lr_mult=5),
        'fc_cls.bias': dict(lr_mult=10, decay_mult=0),
    },
)


def tsm(norm: str) -> nn.Module:
    backbone = dict(TSM, norm_cfg=dict(type=norm))
    return MODELS.build(dict(type='Recognizer2D', backbone=backbone, cls_head=HEAD))


def rates(model: nn.Module, constructor: str, rules: dict) -> dict:
    optimizer = dict(type='SGD', lr=0.02, weight_decay=1e-4)
    cfg = dict(optimizer=optimizer, constructor=constructor, paramwise_cfg=rules)
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    by_parameter = {p: (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    return {name: by_parameter[p] for name, p in model.named_parameters()}


def test_the_rules_of_tsm():
    with pytest.raises(ValueError, match='New atomic module type'):
        rates(tsm('SSNNamedBN'), 'TSMOptimWrapperConstructor', dict(fc_lr5=True))
    theirs = rates(tsm('BN2d'), 'TSMOptimWrapperConstructor', dict(fc_lr5=True))
    ours = rates(tsm('SSNNamedBN'), 'SSNOptimWrapperConstructor', TSM_RULES)
    for name, (lr, decay) in ours.items():
        if name.endswith(('mean_weight', 'var_weight')):
            assert (lr, decay) == (pytest.approx(0.002), 0)
        else:
            assert (lr, decay) == pytest.approx(theirs[name]), name


@pytest.mark.parametrize('path', KINETICS, ids=lambda path: path.stem)
def test_kinetics_configs_build(path):
    norm = re.search('_(ssn|sn|gn|bn)_', path.stem).group(1)
    kind = {'ssn': SSN, 'sn': SN, 'gn': nn.GroupNorm, 'bn': nn.BatchNorm3d}[norm]
    config = Config.fromfile(path)
    model = MODELS.build(config.model)
    model.init_weights()
    every = (SSN, SN, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    norms = [module for module in model.modules() if isinstance(module, every)]
    assert len(norms) == 53
    assert all(type(module) is kind for module in norms)
    assert not model.backbone.layer4[2].conv3.bn.weight.any()
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    assert wrapper.clip_grad_kwargs['max_norm'] == 40


SMALL = """
_base_ = [{base!r}]
model = dict(
    backbone=dict(depth=18, base_channels=8),
    cls_head=dict(in_channels=64, num_classes=2, dropout_ratio=0.0),
)
def pipeline(**options):
    return [
        dict(type='DecordInit', io_backend='disk'),
        dict(type='SampleFrames', clip_len=4, frame_interval=4, num_clips=1, **options),
        dict(type='DecordDecode'),
        dict(type='Resize', scale=(32, 32), keep_ratio=False),
        dict(type='FormatShape', input_format='NCTHW'),
        dict(type='PackActionInputs'),
    ]
here = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=4, dataset=dict(data_root={data!r}, pipeline=pipeline()), **here)
tested = dict(data_root={data!r}, pipeline=pipeline(test_mode=True))
val_dataloader = dict(batch_size=4, dataset=tested, **here)
test_dataloader = dict(dataset=tested, **here)
train_cfg = dict(max_epochs=4, val_interval=4)
param_scheduler = None
optim_wrapper = dict(optimizer=dict(lr=0.02))
randomness = dict(seed=0)
"""


def run(folder: Path, tool: str, *arguments: object) -> str:
    command = [sys.executable, '-W', 'ignore', ROOT / 'tools' / tool, *arguments]
    result = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout + result.stderr


def scores(folder: Path, config: object, checkpoint: str) -> torch.Tensor:
    run(folder, 'test.py', config, checkpoint, '--work-dir', 'tested', '--dump', 'dump.pkl')
    found = pickle.loads((folder / 'dump.pkl').read_bytes())
    return torch.stack([sample['pred_score'] for sample in found])


@pytest.mark.slow
def test_kinetics_on_videos(tmp_path):
    """Trained, tested, collapsed and folded by the tools, in the scope of mmaction."""
    pytest.importorskip('decord')
    from videos import make_videos

    make_videos(tmp_path / 'videos')
    (base,) = (path for path in KINETICS if '_ssn_' in path.stem)
    config = tmp_path / 'small.py'
    config.write_text(SMALL.format(base=str(base), data=str(tmp_path / 'videos')))
    run(tmp_path, 'train.py', config, '--work-dir', 'run')
    state = torch.load(tmp_path / 'run' / 'epoch_4.pth', weights_only=False)['state_dict']
    flags = [value for key, value in state.items() if key.endswith('_fixed')]
    assert len(flags) == 40
    assert all(flags)
    told = run(tmp_path, 'collapse.py', config, 'run/epoch_4.pth', 'collapsed.pth')
    assert '20 SSN layers collapsed' in told
    assert '4 of 4 images of equal class' in told
    run(tmp_path, 'collapse.py', config, 'run/epoch_4.pth', 'folded.pth', '--fold')
    trained = scores(tmp_path, config, 'run/epoch_4.pth')
    assert trained.shape == (12, 2)
    torch.testing.assert_close(
        scores(tmp_path, 'collapsed.py', 'collapsed.pth'), trained, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        scores(tmp_path, 'folded.py', 'folded.pth'), trained, rtol=0, atol=1e-5
    )
