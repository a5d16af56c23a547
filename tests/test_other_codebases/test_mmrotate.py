"""mmrotate: a rotated RetinaNet, trained, decided and collapsed.

It needs mmrotate 1.2.1 beside the OneDL packages; how to install it stands in
docs/other-codebases.md.
"""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.structures import InstanceData
from other_codebases import check_collapse, train

from ssn_plugin import SSN

mmrotate = pytest.importorskip('mmrotate')


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())
    init_default_scope('mmrotate')


def batch(size: int = 64) -> dict:
    from mmdet.structures import DetDataSample
    from mmrotate.structures import RotatedBoxes

    shape = (size, size)
    sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape))
    boxes = RotatedBoxes(torch.tensor([[25.0, 30, 40, 20, 0.3], [40, 20, 20, 30, -0.2]]))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]))
    none = RotatedBoxes(torch.zeros(0, 5))
    sample.ignored_instances = InstanceData(bboxes=none, labels=torch.zeros(0, dtype=torch.long))
    images = [torch.randint(0, 255, (3, *shape), dtype=torch.uint8) for _ in range(2)]
    return dict(inputs=images, data_samples=[sample, sample.clone()])


@pytest.mark.parametrize('backbone', ['mmdet.ResNet', 'SSNResNet'])
def test_a_rotated_detector_is_trained_decided_and_collapsed(backbone):
    configs = Path(mmrotate.__file__).parent / '.mim/configs/rotated_retinanet'
    cfg = Config.fromfile(configs / 'rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py').model
    cfg.backbone.update(type=backbone, depth=18, base_channels=8, stem_channels=8, init_cfg=None)
    cfg.backbone.update(norm_cfg=dict(type='SSN'), norm_eval=False, frozen_stages=-1)
    cfg.neck.update(in_channels=[8, 16, 32, 64], norm_cfg=dict(type='SSN'))
    model = MODELS.build(cfg)
    model.init_weights()
    assert len([module for module in model.modules() if isinstance(module, SSN)]) == 28
    train(model, batch(), 4)
    check_collapse(model, batch())
