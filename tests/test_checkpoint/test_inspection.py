"""inspect_checkpoint tells what a file is."""

import re

import pytest
import torch
from backbones import (
    as_detector,
    as_mmpretrain,
    as_timm,
    as_torchvision,
    batch_norm_network,
    build,
)
from pickled_code import Marker
from released_files import released_checkpoint, released_file, released_state, save
from torch import nn

from ssn_plugin import SSN, set_radius
from ssn_plugin.checkpoint import inspection, release
from ssn_plugin.checkpoint.files import md5_of
from ssn_plugin.checkpoint.inspection import inspect_checkpoint
from ssn_plugin.checkpoint.publish import publish_backbone
from ssn_plugin.errors import CheckpointError
from ssn_plugin.jobs.selection_sources import rows_of

NARROW = dict(base_channels=4, stem_channels=4)


@pytest.fixture
def file(tmp_path):
    return tmp_path / 'net.pth'


def test_released_layout(file):
    path = released_file(file, depth=50, width=4)
    report = inspect_checkpoint(path)
    assert report['file'].startswith(f'{path}, ')
    assert md5_of(path) in report['file']
    assert report['origin'] == "in the layout of the authors' releases, but of no released MD5 sum"
    assert report['network'] == 'ResNet-50 with SSN'
    assert report['norm layers'] == '53 SSN'
    assert report['classifier'] == '10 classes'
    assert report['beside the weights'] == 'epoch, model, best_prec1, optimizer, lr_scheduler'
    state = released_state(50, 4)
    numbers = sum(value.numel() for value in state.values())
    assert report['weights'] == f'{len(state)} entries, {numbers / 1e6:.2f} million numbers'
    assert 'other weights' not in report


def test_histogram_per_stage(file):
    """Counted by hand from the model."""
    kwargs = dict(width=4, undecided=0.3, radius=0.3)
    model = build('mmdet', **NARROW)
    model.load_state_dict(released_state(**kwargs), strict=False)
    lines = inspect_checkpoint(released_file(file, **kwargs))['selection'].split('\n')
    assert [line.split()[0] for line in lines] == [
        'all',
        'stem',
        'layer1',
        'layer2',
        'layer3',
        'layer4',
    ]
    chosen = {n: m.selected for n, m in model.named_modules() if isinstance(m, SSN)}
    sizes = {'all': 20, 'stem': 1, 'layer1': 4, 'layer2': 5, 'layer3': 5, 'layer4': 5}
    for line in lines:
        stage, _, counts = line.partition(' ')
        told = {}
        for part in counts.split(','):
            count, what = part.split()
            told[what] = int(count)
        assert sum(told.values()) == sizes[stage]
        mine = [
            pair
            for name, pair in chosen.items()
            if stage == 'all' or name.startswith('sn1' if stage == 'stem' else stage)
        ]
        expected = {}
        for mean, var in mine:
            what = 'undecided' if None in (mean, var) else mean if mean == var else f'{mean}/{var}'
            expected[what] = expected.get(what, 0) + 1
        assert told == expected


def test_a_released_file_by_its_sum(file, monkeypatch):
    path = released_file(file, width=4)
    row = release.Release((8, 2), 75.85, 'ssn_8x2_75.848.pth')
    monkeypatch.setattr(inspection, 'RELEASES', {md5_of(path): row})
    assert inspect_checkpoint(path)['origin'] == (
        'released by the authors of SSN: 8 GPUs x 2 images, ImageNet top-1 75.85 %'
    )


def test_another_file_under_the_released_name(tmp_path):
    path = released_file(tmp_path / 'ssn_8x2_75.848.pth', width=4)
    assert inspect_checkpoint(path)['origin'] == (
        'bears the name of a released file, but has another MD5 sum'
    )


@pytest.mark.parametrize('using_bn', [True, False])
def test_sn(file, using_bn):
    report = inspect_checkpoint(released_file(file, kind='SN', width=4, using_bn=using_bn))
    assert report['network'] == 'ResNet-18 with SN'
    assert report['norm layers'] == '20 SN'
    assert 'authors' in report['origin']


@pytest.mark.parametrize(
    ('rename', 'kwargs', 'network', 'norms'),
    [
        (as_torchvision, dict(depth=50), 'ResNet-50 with BN', '53 BN'),
        (
            as_timm,
            dict(depth=50, deep_stem=True, avg_down=True, stem_channels=8),
            'ResNet-50 with BN (deep stem, average-pooled shortcuts)',
            '55 BN',
        ),
        (as_mmpretrain, dict(depth=18), "ResNet-18 with BN under 'backbone.'", '20 BN'),
    ],
)
def test_batch_norm_files(file, rename, kwargs, network, norms):
    state = rename(batch_norm_network('mmdet', **NARROW | kwargs).state_dict())
    report = inspect_checkpoint(save(state, file))
    assert (report['network'], report['norm layers']) == (network, norms)
    assert report['classifier'] == '10 classes'
    assert report['origin'] == 'unknown'
    assert 'selection' not in report
    assert 'beside the weights' not in report


def test_detector(file):
    state = as_detector(batch_norm_network('mmdet', **NARROW).state_dict())
    checkpoint = {
        'meta': {'mmengine_version': '0.10.7', 'epoch': 3, 'iter': 70},
        'state_dict': state,
    }
    report = inspect_checkpoint(save(checkpoint, file))
    assert report['network'] == "ResNet-18 with BN under 'backbone.'"
    assert report['norm layers'] == '20 BN'
    assert report['origin'] == 'a training of mmengine 0.10.7: epoch 3, iter 70'
    others = [key for key in state if not key.startswith('backbone.')]
    assert report['other weights'].startswith(f'{len(others)} entries: {others[0]}, ')
    assert report['beside the weights'] == 'meta'
    assert 'classifier' not in report


def ssn_at(*names: str) -> dict:
    return {f'{name}.{key}': value for name in names for key, value in SSN(4).state_dict().items()}


@pytest.mark.parametrize(
    ('names', 'stages'),
    [
        (
            ('sn1', 'sn2', 'layer1.0.sn1', 'transition1.0.1', 'stage2.0.branches.0.0.sn1'),
            {'all': 5, 'stem': 2, 'layer1': 1, 'transition1': 1, 'stage2': 1},  # HRNet
        ),
        (
            ('backbone.stem.conv.sn', 'backbone.stage1.0.sn', 'backbone.stage1.1.main_conv.sn'),
            {'all': 3, 'stem': 1, 'stage1': 2},  # YOLOX
        ),
        (
            ('conv1.1', 'dfm.f_p.sn', 'norm'),
            {'all': 3, 'conv1': 1, 'dfm': 1, 'stem': 1},
        ),
    ],
)
def test_stages_of_other_networks(file, names, stages):
    lines = inspect_checkpoint(save(ssn_at(*names), file))['selection'].splitlines()
    assert {line.split()[0]: int(line.split()[1]) for line in lines} == stages
    assert len({re.match(r'\S+ +', line).end() for line in lines}) == 1  # one column


def test_norms_with_weight_and_bias_alone(file):
    """What LayerNorm keeps is what GroupNorm keeps."""
    one = {'weight': torch.ones(4), 'bias': torch.zeros(4)}
    state = {f'{name}.{key}': value for name in ('a.norm', 'b.ln1', 'c.gn', 'c.gn2')
             for key, value in one.items()}  # fmt: skip
    report = inspect_checkpoint(save(state | ssn_at('d'), file))
    assert report['norm layers'] == '2 LN, GN or IN; 2 GN; 1 SSN'


@pytest.mark.parametrize('radius', [0.0, 1.0])
def test_own_training(file, radius):
    model = build('mmdet', **NARROW)
    set_radius(model, radius)
    report = inspect_checkpoint(save({'state_dict': model.state_dict()}, file))
    expected = '20 BN' if radius else '20 undecided'
    assert report['selection'].split('\n')[0] == f'all     {expected}'


def test_published_file(tmp_path, file):
    done = publish_backbone(released_file(file, width=4), tmp_path / 'r18.pth')
    report = inspect_checkpoint(done.path)
    assert report['origin'].startswith('written by ssn_plugin ')
    assert report['network'] == 'ResNet-18 with SSN'
    assert 'classifier' not in report


def test_no_resnet(file):
    state = {
        'patch_embed.weight': torch.ones(3, 4),
        'norm.weight': torch.ones(4),
        'norm.bias': torch.ones(4),
        'blocks.0.mlp.weight': torch.ones(4, 4),
    }
    report = inspect_checkpoint(save({'model': state, 'epoch': 1}, file))
    assert report['network'] == (
        'no ResNet known here; its keys are patch_embed.weight, norm.weight, norm.bias and 1 more'
    )
    assert report['weights'] == '4 entries, 0.00 million numbers'
    assert report['beside the weights'] == 'epoch'


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        ({'a': 1}, 'holds no state dict of weights'),
        ('text', 'holds a str'),
        ({'state_dict': {'a': torch.ones(1)}, 'x': Marker('/nonexistent/ran')}, 'refused'),
    ],
)
def test_what_cannot_be_inspected(file, content, said):
    with pytest.raises(CheckpointError, match=said):
        inspect_checkpoint(save(content, file))


def test_trusted_code(tmp_path, file):
    checkpoint = released_checkpoint(released_state(width=4)) | {'x': Marker(tmp_path / 'ran')}
    report = inspect_checkpoint(save(checkpoint, file), allow_pickle=True)
    assert report['beside the weights'].endswith(', x')


def test_candidates_are_named_as_analyze_selection_names_them(tmp_path):
    model = build('mmdet', norm_cfg=dict(type='SSN', normalizers=('BN', 'IN', 'LN')))
    set_radius(model, 1.0)
    path = tmp_path / 'net.pth'
    config = "model = dict(norm_cfg=dict(type='SSN', normalizers=['BN', 'IN', 'LN']))"
    torch.save({'meta': {'cfg': config}, 'state_dict': model.state_dict()}, path)
    report = inspect_checkpoint(path)
    assert report['candidates'] == 'BN, IN, LN'
    assert '20 LN' in report['selection']  # the last candidate, at a tie
    assert {row.selected for row in rows_of(str(path))} == {('LN', 'LN')}


def test_candidates_and_selections_of_every_part(file):
    """Each layer's own, as it records them, and not those of the backbone."""
    model = nn.ModuleDict(
        dict(
            backbone=build('mmdet', norm_cfg=dict(type='SSN', normalizers=('IN', 'LN', 'BN'))),
            decode_head=nn.Sequential(SSN(4, normalizers=('LN', 'GN')), nn.LayerNorm(4)),
        )
    )
    set_radius(model, 1.0)
    report = inspect_checkpoint(save({'state_dict': model.state_dict()}, file))
    assert report['candidates'] == 'IN, LN, BN in 20 layers; LN, GN in 1 layers'
    lines = dict(line.split(maxsplit=1) for line in report['selection'].splitlines())
    assert lines['all'] == '20 BN, 1 GN'
    assert lines['stem'] == '1 BN'
    assert lines['decode_head'] == '1 GN'
    assert report['norms elsewhere'] == '1 SSN; 1 LN, GN or IN'


def test_parts_of_another_network(file):
    layers = dict(stage2=nn.ModuleDict(dict(branches=SSN(4))), norm1=SSN(4), stem=SSN(4))
    model = nn.ModuleDict(dict(backbone=nn.ModuleDict(layers)))
    report = inspect_checkpoint(save({'state_dict': model.state_dict()}, file))
    parts = [line.split()[0] for line in report['selection'].splitlines()]
    assert parts == ['all', 'stage2', 'stem']


@pytest.mark.parametrize('commit', ['', 'unknown', '0123456789abcdef' * 2 + '01234567'])
def test_the_version_of_mmengine_without_the_commit_behind_it(file, commit):
    meta = {'mmengine_version': f'0.10.7{commit}', 'epoch': 3, 'iter': 70}
    state = as_detector(batch_norm_network('mmdet', **NARROW).state_dict())
    report = inspect_checkpoint(save({'meta': meta, 'state_dict': state}, file))
    assert report['origin'] == 'a training of mmengine 0.10.7: epoch 3, iter 70'
