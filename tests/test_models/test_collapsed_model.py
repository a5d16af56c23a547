"""CollapsedSSN in configs: what is built, and what of a training's config stays."""

import copy

import pytest
from decided_models import decided_model, demo_config
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from ssn_plugin import SSN, SelectedNorm, collapse_ssn
from ssn_plugin.deploy.collapse import choices_of
from ssn_plugin.layers.plain_norms import GroupNorm
from ssn_plugin.models.collapsed_model import collapsed_config


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_the_written_config_builds_the_collapsed_model(scope):
    config = demo_config(scope)
    model = decided_model(config)
    before = copy.deepcopy(config.to_dict())
    written = collapsed_config(config, choices_of(model)).pretty_text
    assert config.to_dict() == before
    again = Config.fromstring(written, '.py')
    assert again.default_scope == scope
    with DefaultScope.overwrite_default_scope(scope):
        built = MODELS.build(again.model)
    collapsed = collapse_ssn(model)
    assert type(built) is type(collapsed)
    assert [(n, type(m)) for n, m in built.named_modules()] == [
        (n, type(m)) for n, m in collapsed.named_modules()
    ]
    assert not [m for m in built.modules() if isinstance(m, SSN)]
    built.load_state_dict(collapsed.state_dict())
    # As the frameworks' --tta wraps and fills it.
    tta = {'mmdet': 'DetTTAModel', 'mmseg': 'SegTTAModel'}[scope]
    with DefaultScope.overwrite_default_scope(scope):
        wrapped = MODELS.build(dict(type=tta, module=again.model))
    load_state_dict(wrapped, collapsed.state_dict(), strict=True)
    assert type(wrapped.module) is type(collapsed)


def test_a_root_registry_without_scope():
    with DefaultScope.overwrite_default_scope('mmengine'):
        model = MODELS.build(
            dict(type='CollapsedSSN', base='SSN', num_features=4, choices={'': ('IN', 'BN')})
        )
        assert isinstance(model, SelectedNorm)
        settings = dict(num_features=4, choices={'': ('IN', 'IN')}, correction=1)
        assert isinstance(
            MODELS.build(dict(type='CollapsedSSN', base='SSN', **settings)), SelectedNorm
        )
        native = MODELS.build(dict(type='CollapsedSSN', base='SSN', native=True, **settings))
        assert isinstance(native, nn.InstanceNorm2d)


def test_choices_for_another_model():
    with pytest.raises(ValueError, match="got nothing named 'conv9' in the model"):
        MODELS.build(
            dict(type='CollapsedSSN', base='SSN', num_features=4, choices={'conv9': ('IN', 'IN')})
        )


TRAINED = """
default_scope = 'mmdet'
custom_imports = dict(imports='other', allow_failed_imports=True)
model = dict(
    type='mmdet.RetinaNet',
    pretrained='torchvision://resnet18',
    backbone=dict(type='SSNResNet', init_cfg=dict(type='Pretrained', checkpoint='ssn.pth')),
    bbox_head=dict(init_cfg=[
        dict(type='Pretrained', checkpoint='head.pth'), dict(type='Normal', layer='Conv2d')]),
    teachers=[dict(init_cfg=dict(type='Pretrained', checkpoint='teacher.pth'))],
    test_cfg=dict(score_thr=0.5))
load_from = 'start.pth'
resume = True
default_hooks = dict(timer=dict(type='IterTimerHook'), ssn=dict(type='SSNRadiusHook'))
custom_hooks = [
    dict(type='SSNRadiusHook'), dict(type='mmdet.NumClassCheckHook'),
    dict(type='SSNRatioHook'), dict(type='SSNResumeHook'), dict(type='SSNStartHook'),
    dict(type='PreciseStatsHook')]
"""


def test_what_stays_of_a_config():
    config = Config.fromstring(TRAINED, '.py')
    made = collapsed_config(
        config, {'backbone.sn1': ('LN', 'BN')}, native=True, folded=[('conv', 'bn')]
    )
    made = Config.fromstring(made.pretty_text, '.py')
    assert made.model.to_dict() == dict(
        type='CollapsedSSN',
        base='mmdet.RetinaNet',
        choices={'backbone.sn1': ('LN', 'BN')},
        native=True,
        folded=[('conv', 'bn')],
        pretrained=None,
        backbone=dict(type='SSNResNet', init_cfg=None),
        bbox_head=dict(init_cfg=[dict(type='Normal', layer='Conv2d')]),
        teachers=[dict(init_cfg=None)],
        test_cfg=dict(score_thr=0.5),
    )
    assert made.custom_imports == dict(imports=['other', 'ssn_plugin'], allow_failed_imports=True)
    assert made.custom_hooks == [dict(type='mmdet.NumClassCheckHook')]
    assert made.default_hooks == dict(timer=dict(type='IterTimerHook'))
    assert made.load_from is None
    assert not made.resume
    assert config.model.type == 'mmdet.RetinaNet'


def test_a_class_as_type():
    config = Config(dict(model=dict(type=SSN, num_features=4)))
    made = collapsed_config(config, {'': ('LN', 'LN')})
    assert made.model.base == 'ssn_plugin.layers.ssn.SSN'
    assert type(MODELS.build(made.model)) is GroupNorm
