"""The faces configs: built, and trained for real on a folder of class folders."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from ssn_plugin import SSN, SSN1d, undecided_layers

pytest.importorskip('mmpretrain')

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / 'configs' / 'faces').glob('*.py'))


def load(path: Path, folder: Path, monkeypatch) -> Config:
    monkeypatch.setenv('SSN_FACES', str(folder))
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    return config


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_network(path, image_folder, monkeypatch):
    config = load(path, image_folder, monkeypatch)
    model = MODELS.build(config.model)
    norm = re.search('_(ssn|bn)_', path.stem).group(1)
    assert isinstance(model.neck.norm, SSN1d if norm == 'ssn' else nn.BatchNorm1d)
    kind = SSN if norm == 'ssn' else nn.modules.batchnorm._BatchNorm
    assert sum(isinstance(module, kind) for module in model.modules()) == 54
    identities = len(list((image_folder / 'train').iterdir()))
    assert model.head.num_classes == identities
    assert config.data_preprocessor.num_classes == identities


@pytest.mark.slow
def test_training(image_folder, tmp_path, monkeypatch):
    (path,) = (path for path in CONFIGS if '_ssn_' in path.stem)
    config = load(path, image_folder, monkeypatch)
    config.work_dir = str(tmp_path)
    config.model.backbone.update(depth=18, base_channels=16, stem_channels=16)
    config.model.neck.update(in_channels=128, out_channels=64)
    config.model.head.update(in_channels=64, scale=16.0, margins=0.2)
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.update(batch_size=32, num_workers=0, persistent_workers=False)
        loader.dataset.pipeline[1].scale = (48, 48)
    config.train_cfg.update(max_epochs=6, val_interval=6)
    config.optim_wrapper.optimizer.lr = 0.05
    config.param_scheduler = None
    config.randomness = dict(seed=0)
    runner = Runner.from_cfg(config)
    runner.train()
    assert undecided_layers(runner.model) == []
    assert len([m for m in runner.model.modules() if isinstance(m, SSN)]) == 21
    assert 'IN' not in runner.model.neck.norm.selected
    assert all(parameter.isfinite().all() for parameter in runner.model.parameters())
    accuracy = runner.message_hub.get_scalar('val/accuracy/top1').current()
    assert accuracy > 3 * 100 / runner.model.head.num_classes
    embedding = runner.model.eval().extract_feat(torch.randn(2, 3, 48, 48))
    assert embedding[-1].shape == (2, 64)
