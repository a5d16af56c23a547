"""The command-line tools around checkpoints; what trains or runs code is a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from backbones import as_mmpretrain, batch_norm_network, build, images, pretrained
from pickled_code import Marker
from plain_resnet import relative_error
from released_files import released_checkpoint, released_file, released_state, save
from tool_runs import run_here

from ssn_plugin import SSN

ROOT = Path(__file__).parents[1]
CONFIG = """
default_scope = 'mmseg'
custom_imports = dict(imports=['ssn_plugin'])
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
    backbone=dict(
        type='SSNResNet', depth=18, base_channels=4, stem_channels=4,
        norm_cfg=dict(type='SSN', correction=1, momentum=0.003),
        init_cfg=dict(type='Pretrained', checkpoint='net.pth')),
    decode_head=dict(
        type='FCNHead', in_channels=32, in_index=3, channels=4, num_convs=1, concat_input=False,
        num_classes=2, norm_cfg=None, loss_decode=dict(type='CrossEntropyLoss')),
    test_cfg=dict(mode='whole'))
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset', metainfo=dict(classes=('a', 'b'), palette=[[0, 0, 0], [1, 1, 1]]),
        data_root='data', img_suffix='.png', seg_map_suffix='.png',
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=[
            dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
            dict(type='PackSegInputs')]))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.01), constructor='SSNOptimWrapperConstructor')
custom_hooks = [dict(type='SSNRadiusHook')]
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
    logger=dict(type='LoggerHook', interval=1))
log_processor = dict(by_epoch=False)
"""


UNSET = ('SSN_ALLOW_PICKLE', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')


def run(folder: Path, tool: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key not in UNSET},
    )


def run_in_here(folder: Path, tool: str, *arguments: object) -> subprocess.CompletedProcess:
    """As :func:`run`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in UNSET:
            patch.delenv(name, raising=False)
        return subprocess.CompletedProcess(tool, *run_here(tool, *map(str, arguments)))


def assert_one_line(result, tool: str, *said: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    assert 'Traceback' not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith(f'{tool}: ')]
    assert len(lines) == 1, result.stderr
    assert result.stderr.rstrip().endswith(lines[0])
    for text in said:
        assert text in lines[0]


# ---------------------------------------------------------------- warm_start.py


def test_an_exact_copy_by_the_tool(tmp_path):
    network = batch_norm_network('mmseg', depth=50, deep_stem=True)
    save({'state_dict': as_mmpretrain(network.state_dict())}, tmp_path / 'bn.pth')
    result = run_in_here(tmp_path, 'warm_start.py', 'bn.pth', 'ssn.pth', '--bn-ratio', 1, '--fix')
    assert result.returncode == 0, result.stderr
    assert 'ssn.pth: 55 SSN layers with BN at an importance ratio of 1' in result.stdout
    path = tmp_path / 'ssn.pth'
    model = build('mmseg', depth=50, deep_stem=True, stem_padding=1, init_cfg=pretrained(path))
    model.init_weights()
    model.eval()
    with torch.no_grad():
        for ours, theirs in zip(model(images()), network(images()), strict=True):
            assert relative_error(ours, theirs.double()) < 1e-5
    assert {m.selected for m in model.modules() if isinstance(m, SSN)} == {('BN', 'BN')}
    assert sorted(os.listdir(tmp_path)) == ['bn.pth', 'ssn.pth']


def test_ratio_and_candidates_by_the_tool(tmp_path):
    save(batch_norm_network('mmdet').state_dict(), tmp_path / 'bn.pth')
    (tmp_path / 'ssn.pth').write_text('to be replaced')
    result = run_in_here(
        tmp_path, 'warm_start.py', 'bn.pth', 'ssn.pth', '--bn-ratio', 0.7, '--overwrite',
        '--normalizers', 'IN', 'BN',
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    state = torch.load(tmp_path / 'ssn.pth', weights_only=True)['state_dict']
    assert state['layer3.0.sn2.var_weight'].tolist() == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['--bn-ratio', '1.5'], 'bn_ratio: got 1.5, expected a number in [0, 1]'),
        ([], 'code.pth: refused, because reading it would run code'),
    ],
)
def test_warm_start_of_bad_input(tmp_path, arguments, said):
    content = {'state_dict': batch_norm_network('mmdet').state_dict()}
    save(content | {'x': Marker(tmp_path / 'ran')}, tmp_path / 'code.pth')
    result = run_in_here(tmp_path, 'warm_start.py', 'code.pth', 'ssn.pth', *arguments)
    assert_one_line(result, 'warm_start.py', said)
    assert os.listdir(tmp_path) == ['code.pth']


# ---------------------------------------------------------------- publish, inspect


def test_publish_and_inspect(tmp_path):
    released_file(tmp_path / 'ssn.pth')
    result = run_in_here(tmp_path, 'publish_backbone.py', 'ssn.pth', 'r18.pth')
    assert result.returncode == 0, result.stderr
    (name,) = (path.name for path in tmp_path.glob('r18-*.pth'))
    assert f'{name}: ResNet-18 with SSN, ' in result.stdout
    assert 'left out: fc.weight, fc.bias' in result.stdout
    assert 'left out beside the weights: epoch, model, best_prec1, optimizer' in result.stdout
    chosen = torch.load(tmp_path / name, weights_only=True)['meta']['histogram']
    counts = ', '.join(f'{count} {pair}' for pair, count in chosen.items())
    assert f'selection: {counts}' in result.stdout

    result = run_in_here(tmp_path, 'inspect_checkpoint.py', 'ssn.pth')
    assert result.returncode == 0, result.stderr
    report = dict(line.split(':', 1) for line in result.stdout.splitlines() if line[0] != ' ')
    assert report['network'].strip() == 'ResNet-18 with SSN'
    assert report['norm layers'].strip() == '20 SSN'
    assert report['selection'].split() == ['all', *counts.split()]
    assert 'authors' in report['origin']


def test_truncated_input(tmp_path):
    file = tmp_path / 'ssn.pth'
    released_file(file)
    file.write_bytes(file.read_bytes()[:-5000])
    result = run_in_here(tmp_path, 'publish_backbone.py', 'ssn.pth', 'out.pth')
    said = 'ssn.pth: truncated, or not a checkpoint of torch'
    assert_one_line(result, 'publish_backbone.py', said)
    assert os.listdir(tmp_path) == ['ssn.pth']


@pytest.mark.slow
def test_the_flag_of_a_tool(tmp_path):
    content = released_checkpoint(released_state()) | {'x': Marker(tmp_path / 'ran')}
    save(content, tmp_path / 'code.pth')
    result = run(tmp_path, 'inspect_checkpoint.py', 'code.pth', '--allow-pickle')
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'ran').exists()


# ---------------------------------------------------------------- train.py


@pytest.fixture
def folder(tmp_path):
    """A config that starts from net.pth, and data for it."""
    for name in ('images', 'labels'):
        mmcv.imwrite(np.zeros((64, 64), np.uint8), str(tmp_path / 'data' / name / 'a.png'))
    (tmp_path / 'config.py').write_text(CONFIG)
    return tmp_path


@pytest.mark.slow
def test_training_starts_from_a_released_file(folder):
    released_file(folder / 'net.pth', width=4)
    result = run(folder, 'train.py', 'config.py')
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    said = result.stdout + result.stderr
    count = len([key for key in released_state(width=4) if not key.startswith('fc.')])
    assert (
        f'all {count} weights and buffers filled from net.pth, a ResNet-18 with SSN; 20 of' in said
    )
    saved = torch.load(folder / 'work_dirs/config/iter_2.pth', weights_only=False)['state_dict']
    for key, value in released_state(width=4).items():
        if key.endswith(('mean_weight', 'var_weight', '_fixed')):
            assert torch.equal(saved[f'backbone.{key}'].flatten(), value.flatten())


def drop(key):
    state = released_state(width=4)
    del state[key]
    return released_checkpoint(state)


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        (
            lambda: drop('layer3.1.sn2.bias'),
            'does not fill the backbone: missing layer3.1.sn2.bias',
        ),
        pytest.param(
            lambda: released_checkpoint(released_state(50, 4)),
            'it holds a ResNet-50 with SSN, expected a ResNet-18 with SSN',
            marks=pytest.mark.slow,
        ),
        (
            lambda: released_checkpoint(released_state(width=4)) | {'x': Marker('ran')},
            'refused, because reading it would run code: it holds a pickled posix.system',
        ),
    ],
    ids=['a key is missing', 'R50 into R18', 'code'],
)
def test_training_refuses_what_does_not_fit(folder, content, said):
    save(content(), folder / 'net.pth')
    result = run(folder, 'train.py', 'config.py')
    assert_one_line(result, 'train.py', 'net.pth: ', said)
    assert not (folder / 'ran').exists()
    assert list(folder.rglob('*.pth')) == [folder / 'net.pth']
