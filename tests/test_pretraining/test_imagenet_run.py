"""An ImageNet config as it stands, on a thousand tiny classes and with a narrow network."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

from ssn_plugin import undecided_layers
from ssn_plugin.jobs.class_folders import check_class_folders
from ssn_plugin.jobs.preflight import check_data

pytest.importorskip('mmpretrain')

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """ImageNet's layout with one picture per class: a colour per class, some noise."""
    root = tmp_path_factory.mktemp('imagenet')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for label in range(1000):
            folder = root / split / f'n{label:08d}'
            folder.mkdir(parents=True)
            noise = rng.integers(0, 40, (40, 48, 3)) + rng.integers(0, 200, 3)
            Image.fromarray(noise.astype(np.uint8)).save(folder / 'picture.JPEG')
    return root


def test_recipe_switches_and_every_layer_decides(imagenet, tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/imagenet/resnet50_ssn_8xb2_in1k.py')
    cfg.work_dir = str(tmp_path)
    cfg.model.backbone.update(base_channels=4, stem_channels=4)
    cfg.model.head.in_channels = 128
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=50, num_workers=2)
        loader.dataset.data_root = str(imagenet)
        check_data(cfg, split)
    check_class_folders(cfg, ('train', 'val'))
    cfg.train_cfg.update(max_epochs=2, val_interval=2)
    # Sizes that tell which pipeline a picture went through.
    cfg.train_dataloader.dataset.pipeline[1].scale = 32
    (late,) = cfg.default_hooks.switch_recipe.schedule
    late.action_epoch = 2
    late.train_pipeline[1].scale = 72
    late.train_pipeline[2].crop_size = 64
    for split in ('val', 'test'):
        cfg[f'{split}_dataloader'].dataset.pipeline[1].scale = 36
        cfg[f'{split}_dataloader'].dataset.pipeline[2].crop_size = 32
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    cfg.default_hooks.logger.interval = 5

    runner = Runner.from_cfg(cfg)
    sizes = []
    runner.model.backbone.register_forward_pre_hook(
        lambda module, inputs: sizes.append((runner.epoch, module.training, inputs[0].shape[-1]))
    )
    runner.train()

    assert {size for epoch, training, size in sizes if training and epoch == 0} == {32}
    assert {size for epoch, training, size in sizes if training and epoch == 1} == {64}
    assert sum(training for _, training, _ in sizes) == 2 * 20
    assert undecided_layers(runner.model) == []
    # 1000 pictures of 1000 classes in 40 steps: what counts is that all of them were scored.
    scores = runner.val_loop.evaluator.metrics
    assert [metric.topk for metric in scores] == [(1, 5)]
    assert (tmp_path / 'epoch_2.pth').is_file()
