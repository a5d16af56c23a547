"""What is wrong with the model of a config, in one line, before anything is trained or tested."""

import pytest
from mmengine.config import Config
from torch import nn

from ssn_plugin import SSN
from ssn_plugin.errors import InputError
from ssn_plugin.jobs.model_check import (
    check_constructor,
    check_norms,
    checked_model,
    start_options,
)


def config_of(**model) -> Config:
    return Config(dict(default_scope='mmengine', model=dict(type='ToyNet', **model)))


@pytest.mark.parametrize(
    ('kind', 'said'),
    [
        (
            'SNN',
            "model.norm_cfg.type: got 'SNN', expected a registered norm layer, such as SN, SSN",
        ),
        ('SyncSNN', 'such as SyncSSN'),
        ('mmnothing.Norm', 'custom_imports'),
    ],
)
def test_a_norm_that_nobody_knows(kind, said):
    with pytest.raises(InputError) as caught:
        checked_model(config_of(norm_cfg=dict(type=kind)), 'a.py')
    assert said in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', ['SSN', 'SyncSSN', 'SN', 'BN', 'mmengine.SSN', nn.BatchNorm2d])
def test_norms_that_are_registered(kind):
    assert isinstance(checked_model(config_of(norm_cfg=dict(type=kind)), 'a.py'), nn.Module)


@pytest.mark.parametrize('constructor', [None, 'SSNOptimConstructor', 3])
def test_a_constructor_that_nobody_knows(constructor):
    config = Config(dict(optim_wrapper=dict(constructor=constructor)))
    with pytest.raises(InputError) as caught:
        check_constructor(config)
    assert f'optim_wrapper.constructor: got {constructor!r}, ' in str(caught.value)
    assert "'SSNOptimWrapperConstructor'" in str(caught.value)


@pytest.mark.parametrize('wrapper', [{}, dict(constructor='DefaultOptimWrapperConstructor')])
def test_constructors_that_are_registered(wrapper):
    check_constructor(Config(dict(optim_wrapper=wrapper)))


def test_a_config_without_a_model():
    assert checked_model(Config(dict(a=1)), 'a.py') is None


def test_where_a_layer_could_not_be_built():
    with pytest.raises(InputError) as caught:
        checked_model(config_of(norm_cfg=dict(type='GN', num_groups=3)), 'a.py')
    text = str(caught.value)
    assert text.startswith('config: cannot build the model of a.py in ToyNet > GroupNorm: ')
    assert 'num_channels' in text
    assert 'class `' not in text


class Holder(nn.Module):
    def __init__(self, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def test_weights_of_a_part():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model = Holder(backbone=nn.Sequential(nn.Conv2d(3, 4, 1), SSN(4)), neck=nn.BatchNorm2d(4))
    whole = Holder(backbone=backbone, neck=nn.BatchNorm2d(4))
    for state in (backbone.state_dict(), whole.state_dict()):
        with pytest.raises(InputError) as caught:
            check_norms(model, 'model.backbone.init_cfg.checkpoint', 'f.pth', state)
        text = str(caught.value)
        assert text.startswith('model.backbone.init_cfg.checkpoint: f.pth has ')
        assert 'bn2ssn://f.pth' in text
    for key in ('model.backbone.init_cfg.checkpoint', 'model.backbone.pretrained'):
        check_norms(model, key, 'f.pth', model.backbone.state_dict())
    with pytest.raises(InputError, match=r'load_from: f\.pth has 1 BN in backbone'):
        check_norms(model, 'load_from', 'f.pth', dict(state_dict=whole.state_dict()))
    check_norms(model, 'load_from', 'f.pth', dict(state_dict=model.state_dict()))
    check_norms(model, 'load_from', 'f.pth', dict(epoch=3))  # nothing to compare


@pytest.mark.parametrize(
    ('entries', 'added'),
    [
        (dict(), False),
        (dict(custom_imports=dict(imports=['other'])), False),
        (dict(custom_imports=dict(imports=['ssn_plugin'])), True),
        (dict(custom_imports=dict(imports='ssn_plugin')), True),
        (
            dict(
                custom_imports=dict(imports=['ssn_plugin']),
                custom_hooks=[dict(type='SSNStartHook')],
            ),
            False,
        ),
        (
            dict(
                custom_imports=dict(imports=['ssn_plugin']),
                default_hooks=dict(start=dict(type='SSNStartHook'), logger=None),
            ),
            False,
        ),
    ],
)
def test_the_hook_is_added_once_and_where_this_package_is(entries, added):
    expected = ['default_hooks.ssn_start.type=SSNStartHook'] if added else []
    assert start_options(Config(entries)) == expected
