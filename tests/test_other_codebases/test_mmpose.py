"""mmpose: SSNResNet with its defaults, trained, decided and collapsed in a top-down estimator.

It needs mmpose 1.3.2, which does not install beside the OneDL packages; how to make the environment
stands in docs/other-codebases.md.
"""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from other_codebases import check_collapse, train
from torch import nn

from ssn_plugin import SSN

mmpose = pytest.importorskip('mmpose')
pytest.importorskip('mmpose.models')
get_packed_inputs = pytest.importorskip('mmpose.testing').get_packed_inputs

CODEC = dict(type='MSRAHeatmap', input_size=(64, 64), heatmap_size=(16, 16), sigma=2)
ESTIMATOR = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=dict(type='PoseDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(type='SSNResNet', depth=18, base_channels=8, stem_channels=8),
    head=dict(
        type='HeatmapHead',
        in_channels=64,
        out_channels=17,
        deconv_out_channels=(16, 16, 16),
        loss=dict(type='KeypointMSELoss', use_target_weight=True),
        decoder=CODEC,
    ),
    test_cfg=dict(flip_test=False),
)


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())
    init_default_scope('mmpose')


def batch() -> dict:
    return get_packed_inputs(2, img_shape=(64, 64), heatmap_size=(16, 16))


def test_an_estimator_is_trained_decided_and_collapsed():
    model = MODELS.build(ESTIMATOR)
    model.init_weights()
    assert type(model.backbone).__module__ == 'ssn_plugin.models.mmpose_resnet'
    assert len([module for module in model.modules() if isinstance(module, SSN)]) == 20
    losses = train(model, batch(), 12)
    assert losses[-1]['loss_kpt'] < losses[0]['loss_kpt']
    check_collapse(model, batch())


def test_rtmpose():
    """Whose backbone is mmdet's CSPNeXt."""
    path = Path(mmpose.__file__).parent / '.mim/configs/body_2d_keypoint/rtmpose/coco'
    cfg = Config.fromfile(path / 'rtmpose-t_8xb256-420e_coco-256x192.py').model
    cfg.backbone.update(norm_cfg=dict(type='SSN'), widen_factor=0.125, init_cfg=None)
    cfg.head.in_channels = 128
    model = MODELS.build(cfg)
    data = get_packed_inputs(2, img_shape=(256, 192), input_size=(192, 256), with_simcc_label=True)
    assert len([module for module in model.modules() if isinstance(module, SSN)]) == 33
    train(model, data, 4)
    check_collapse(model, data)


def test_norm_eval_is_that_of_mmpose_and_reaches_ssn():
    backbone = MODELS.build(ESTIMATOR['backbone'])
    assert not backbone.norm_eval
    frozen = MODELS.build(dict(ESTIMATOR['backbone'], norm_eval=True))
    frozen.train()
    layers = [module for module in frozen.modules() if isinstance(module, SSN | nn.BatchNorm2d)]
    assert len(layers) == 20
    assert not any(layer.training for layer in layers)
