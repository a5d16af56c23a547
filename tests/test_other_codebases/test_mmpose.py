"""mmpose: SSNResNet with its defaults, trained, decided and collapsed in a top-down estimator.

It needs mmpose 1.3.2, which does not install beside the OneDL packages; how to make the environment
stands in docs/other-codebases.md.
"""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from ssn_plugin import SSN, collapse_ssn, radius_at, set_radius, undecided_layers

pytest.importorskip('mmpose.models')
from mmpose.testing import get_packed_inputs

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
    wrapper = build_optim_wrapper(
        model,
        dict(optimizer=dict(type='Adam', lr=1e-3), constructor='SSNOptimWrapperConstructor'),
    )
    losses = []
    data = batch()
    for step in range(12):
        set_radius(model, radius_at(step / 12))
        losses.append(float(model.train_step(copy.deepcopy(data), wrapper)['loss_kpt']))
    assert losses[-1] < losses[0]
    assert undecided_layers(model) == []
    model.eval()
    collapsed = collapse_ssn(copy.deepcopy(model))
    assert not [module for module in collapsed.modules() if isinstance(module, SSN)]
    found, expected = (
        m.data_preprocessor(copy.deepcopy(data), False)['inputs'] for m in (collapsed, model)
    )
    with torch.no_grad():
        torch.testing.assert_close(
            collapsed(found, None, mode='tensor'),
            model(expected, None, mode='tensor'),
            rtol=1e-4,
            atol=1e-5,
        )


def test_norm_eval_is_that_of_mmpose_and_reaches_ssn():
    backbone = MODELS.build(ESTIMATOR['backbone'])
    assert not backbone.norm_eval
    frozen = MODELS.build(dict(ESTIMATOR['backbone'], norm_eval=True))
    frozen.train()
    layers = [module for module in frozen.modules() if isinstance(module, SSN | nn.BatchNorm2d)]
    assert len(layers) == 20
    assert not any(layer.training for layer in layers)
