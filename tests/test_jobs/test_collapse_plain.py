"""Back to the framework alone: a pair that nothing of this package is needed for."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from decided_models import decided_model, demo_config, small_segmentor
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from ssn_plugin import SSN
from ssn_plugin.errors import InputError
from ssn_plugin.jobs.collapse import collapse_checkpoint
from ssn_plugin.models.plain_config import plain_config

# What the framework makes of a pair where this package is not installed.
ALONE = """
import importlib.util
assert importlib.util.find_spec('ssn_plugin') is None
import cv2, numpy, torch
{predict}
numpy.savez('found.npz', *outputs, norms=sorted(
    {{type(m).__name__ for m in model.modules() if 'Norm' in type(m).__name__}}))
"""
PREDICT = {
    'mmseg': """
from mmseg.apis import inference_model, init_model
model = init_model(CONFIG, CHECKPOINT, device='cpu')
outputs = [inference_model(model, cv2.imread(IMAGE)).seg_logits.data]
""",
    'mmdet': """
from mmdet.apis import inference_detector, init_detector
model = init_detector(CONFIG, CHECKPOINT, device='cpu')
found = inference_detector(model, cv2.imread(IMAGE)).pred_instances
outputs = [found.bboxes, found.scores, found.labels, found.masks]
""",
}


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())


def settings() -> Config:
    config = small_segmentor(normalizers=('IN', 'LN', 'GN', 'BN'))
    config.model.backbone.stem_padding = 1
    return config


def chose(config: Config, **pairs) -> nn.Module:
    """A model whose parts chose these normalizers."""
    model = decided_model(config)
    for name, layer in model.named_modules():
        if isinstance(layer, SSN):
            layer.select(*pairs[name.partition('.')[0]])
    return model


def collapse(folder: Path, config: Config, model: nn.Module, **kwargs):
    (folder / 'net.py').write_text(config.pretty_text)
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, folder / 'net.pth')
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    cv2.imwrite(str(folder / 'a.png'), image)
    paths = [str(folder / name) for name in ('net.py', 'net.pth', 'out.pth')]
    return collapse_checkpoint(*paths, images=[str(folder / 'a.png')], plain=True, **kwargs)


BN, LN, GN, IN = ('BN', 'BN'), ('LN', 'LN'), ('GN', 'GN'), ('IN', 'IN')


@pytest.mark.parametrize(
    ('head', 'norm_cfg', 'norms'),
    [
        (LN, dict(type='GN', num_groups=1), ['BatchNorm2d', 'GroupNorm']),
        (IN, dict(type='IN', affine=True), ['BatchNorm2d', 'InstanceNorm2d']),
    ],
)
def test_the_framework_alone(head, norm_cfg, norms, tmp_path):
    model = chose(settings(), backbone=BN, decode_head=head)
    done = collapse(tmp_path, settings(), model)
    assert done.comparison.largest <= 1e-5
    text = done.config.read_text()
    assert 'ssn' not in text.lower()
    config = Config.fromfile(done.config)
    assert config.model.type == 'EncoderDecoder'
    assert config.model.backbone.type == 'ResNet'
    assert config.model.decode_head.norm_cfg == norm_cfg
    state = torch.load(done.checkpoint, weights_only=True)['state_dict']
    assert 'backbone.bn1.running_mean' in state
    assert not [key for key in state if '.sn' in key]
    assert compared('mmseg', tmp_path) == norms


def compared(framework: str, folder: Path) -> list[str]:
    """The norms of the plain pair without this package, which predicts what the trained one did."""
    paths = dict(CONFIG='out.py', CHECKPOINT='out.pth', IMAGE='a.png')
    predict = PREDICT[framework]
    alone = ALONE.format(predict=predict)
    for name, path in paths.items():
        alone = alone.replace(name, repr(path))
    (folder / 'installed').mkdir()
    for found in (Path(place) for place in sys.path if place.endswith('-packages')):
        for entry in found.iterdir():
            if 'ssn_plugin' not in entry.name and not (folder / 'installed' / entry.name).exists():
                (folder / 'installed' / entry.name).symlink_to(entry)
    # -S: without the .pth files, which add folders and an editable installation
    command = [sys.executable, '-S', '-c', alone]
    environment = os.environ | dict(PYTHONPATH=str(folder / 'installed'))
    subprocess.run(command, cwd=folder, check=True, env=environment)
    trained = dict(CONFIG='net.py', CHECKPOINT='net.pth', IMAGE='a.png')
    space = {name: str(folder / path) for name, path in trained.items()} | {'cv2': cv2}
    exec(predict, space)
    with np.load(folder / 'found.npz') as found:
        for number, expected in enumerate(space['outputs']):
            output = torch.from_numpy(found[f'arr_{number}'])
            assert output.numel() > 0
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        return found['norms'].tolist()


def test_a_detector_alone(tmp_path):
    config = demo_config('mmdet', normalizers=('IN', 'GN', 'BN'))
    config.model.backbone.stem_padding = 1
    model = chose(config, backbone=BN, neck=IN, roi_head=GN)
    spread = {'fc_cls': 0.3, 'rpn_cls': 0.3, 'fc_reg': 0.02}
    for name, parameter in model.named_parameters():
        for layer, std in spread.items():
            if name.endswith(f'{layer}.weight'):
                torch.nn.init.normal_(parameter, std=std)
    done = collapse(tmp_path, config, model)
    assert 'ssn' not in done.config.read_text().lower()
    assert compared('mmdet', tmp_path) == ['BatchNorm2d', 'GroupNorm', 'InstanceNorm2d']


@pytest.mark.parametrize(
    ('config', 'head', 'said'),
    [
        (settings, ('LN', 'BN'), r'layers of model.decode_head.norm_cfg chose 1 LN/BN, where'),
        (small_segmentor, BN, 'only with stem_padding=1'),
    ],
)
def test_what_the_framework_has_no_name_for(config, head, said, tmp_path):
    model = chose(config(), backbone=BN, decode_head=head)
    with pytest.raises(InputError, match=f'^--plain: .*{said}') as caught:
        collapse(tmp_path, config(), model)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'out.pth').exists()


def test_layers_of_one_part_that_chose_differently(tmp_path):
    model = chose(settings(), backbone=BN, decode_head=BN)
    model.backbone.layer1[0].sn2.select('LN', 'LN')
    with pytest.raises(InputError, match=r'model.backbone.norm_cfg chose 4 BN, 1 LN, where'):
        collapse(tmp_path, settings(), model)
    with pytest.raises(InputError, match='--plain: goes neither with --fold'):
        collapse(tmp_path, settings(), model, fold=True)


def test_instance_norm_of_a_map_of_one_pixel(tmp_path):
    """Which torch's own refuses, and ours does not."""
    config = demo_config('mmseg', normalizers=('IN', 'BN'))
    config.model.backbone.stem_padding = 1
    model = chose(config, backbone=BN, decode_head=IN, auxiliary_head=BN)
    with pytest.raises(InputError, match=r'the new model does not run on the images: .* 1, 1'):
        collapse(tmp_path, config, model)
    assert not (tmp_path / 'out.pth').exists()


def test_every_part_of_a_detector():
    """Parts of one norm_cfg object, nested ones, and what trains SSN."""
    config = demo_config('mmdet')
    config.model.backbone.stem_padding = 1
    model = chose(config, backbone=BN, neck=GN, roi_head=LN)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SSN)}
    plain = plain_config(config, layers)
    assert plain.model.neck.norm_cfg == dict(type='GN', num_groups=8)
    assert plain.model.roi_head.mask_head.norm_cfg == dict(type='GN', num_groups=1)
    assert plain.model.backbone.norm_cfg.type == 'BN'
    assert plain.default_hooks.checkpoint.type == 'CheckpointHook'
    assert 'ssn' not in plain.pretty_text.lower()
    assert config.model.neck.norm_cfg.type == 'SSN'
    config.model.backbone.plugins = [dict(cfg=dict(type='SSN'))]
    with pytest.raises(InputError, match='--plain: the config needs SSN of ssn_plugin'):
        plain_config(config, layers)
