"""Back to the framework alone: a pair that nothing of this package is needed for."""

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

# What the framework makes of a pair where this package cannot be imported.
ALONE = """
import sys
sys.modules['ssn_plugin'] = None
import cv2, numpy, torch
from mmseg.apis import inference_model, init_model
model = init_model('out.py', 'out.pth', device='cpu')
result = inference_model(model, cv2.imread('a.png'))
numpy.savez('found.npz', logits=result.seg_logits.data, norms=sorted(
    {type(m).__name__ for m in model.modules() if 'Norm' in type(m).__name__}))
assert not [name for name in sys.modules if name.startswith('ssn_plugin.')]
"""


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())


def settings() -> Config:
    config = small_segmentor()
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


BN, LN, GN = ('BN', 'BN'), ('LN', 'LN'), ('GN', 'GN')


@pytest.mark.parametrize(
    ('head', 'norm_cfg', 'norms'),
    [
        (BN, dict(type='BN'), ['BatchNorm2d']),
        (LN, dict(type='GN', num_groups=1), ['BatchNorm2d', 'GroupNorm']),
        (GN, dict(type='GN', num_groups=8), ['BatchNorm2d', 'GroupNorm']),
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
    subprocess.run([sys.executable, '-c', ALONE], cwd=tmp_path, check=True)
    found = np.load(tmp_path / 'found.npz')
    assert found['norms'].tolist() == norms
    from mmseg.apis import inference_model, init_model

    trained = init_model(str(tmp_path / 'net.py'), str(tmp_path / 'net.pth'), device='cpu')
    expected = inference_model(trained, cv2.imread(str(tmp_path / 'a.png'))).seg_logits.data
    torch.testing.assert_close(torch.from_numpy(found['logits']), expected, rtol=1e-4, atol=1e-5)


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
