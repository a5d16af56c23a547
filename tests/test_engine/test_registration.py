"""Registration: found from every scope, through mmcv's builders, and with a codebase missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer, is_norm
from mmcv.cnn.utils import fuse_conv_bn
from mmengine.config import Config
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope
from torch import nn

import ssn_plugin
from ssn_plugin import SN, SSN, SSN1d, SSN2d, SSN3d, SyncSSN, set_radius
from ssn_plugin.engine.hooks.radius_hook import SSNRadiusHook
from ssn_plugin.engine.hooks.ratio_hook import SSNRatioHook
from ssn_plugin.engine.optim_wrapper_constructor import SSNOptimWrapperConstructor

LAYERS = dict(SSN=SSN, SSN1d=SSN1d, SSN2d=SSN2d, SSN3d=SSN3d, SN=SN)


@pytest.fixture(params=[None, 'mmdet', 'mmseg'])
def scope(request):
    """The default scope of a run, None where code builds by hand."""
    with DefaultScope.overwrite_default_scope(request.param):
        yield request.param


def run_python(code, *arguments):
    """Run code in a fresh interpreter and return what its last line holds as JSON."""
    result = subprocess.run(
        [sys.executable, '-c', code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, 'PYTHONPATH': str(Path(ssn_plugin.__file__).parents[1])},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# ---------------------------------------------------------------- mmcv's builders


@pytest.mark.parametrize('name', LAYERS)
def test_build_norm_layer(scope, name):
    attribute, layer = build_norm_layer(dict(type=name), 8, postfix=1)
    assert attribute == 'sn1'
    assert type(layer) is LAYERS[name]
    assert layer.num_features == 8
    assert layer.eps == 1e-5
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_name_without_and_with_other_postfix():
    assert build_norm_layer(dict(type='SSN'), 4)[0] == 'sn'
    assert build_norm_layer(dict(type='SN'), 4, postfix='_a')[0] == 'sn_a'


def test_arguments_reach_the_layer():
    cfg = dict(type='SSN', eps=1e-3, momentum=0.003, correction=1, normalizers=('IN', 'BN'))
    layer = build_norm_layer(cfg, 4)[1]
    assert (layer.eps, layer.momentum, layer.correction) == (1e-3, 0.003, 1)
    assert layer.normalizers == ('IN', 'BN')
    assert cfg == dict(cfg, type='SSN')  # the config of the caller is not consumed


def test_eps_is_injected_by_mmcv():
    """A layer without an eps argument could not be built."""

    class Other(SSN):
        def __init__(self, num_features, eps):
            super().__init__(num_features, eps)

    assert build_norm_layer(dict(type=Other), 4)[1].eps == 1e-5


@pytest.mark.parametrize('misspelt', ['momentun', 'ep', 'requires_gradient'])
def test_misspelt_keyword_is_an_error(misspelt):
    with pytest.raises(TypeError, match=misspelt):
        build_norm_layer({'type': 'SSN', misspelt: 0.1}, 4)


@pytest.mark.parametrize('requires_grad', [True, False])
@pytest.mark.parametrize('name', ['SSN', 'SN'])
def test_requires_grad_reaches_all_parameters_control_parameters_included(name, requires_grad):
    layer = build_norm_layer(dict(type=name, requires_grad=requires_grad), 4)[1]
    grads = {key: parameter.requires_grad for key, parameter in layer.named_parameters()}
    assert grads == dict.fromkeys(('weight', 'bias', 'mean_weight', 'var_weight'), requires_grad)


def test_layer_built_without_gradient_keeps_its_ratios():
    layer = build_norm_layer(dict(type='SSN', requires_grad=False), 4)[1]
    set_radius(layer, 1.0)
    assert layer.selected == (None, None)
    assert layer.radius == 0


def test_dimensions_of_the_variants():
    flat, images, volumes = [(2, 4), (2, 4, 5)], [(2, 4, 5, 5)], [(2, 4, 3, 3, 3)]
    shapes = dict(SSN1d=flat, SSN2d=images, SSN3d=volumes)
    shapes['SSN'] = shapes['SN'] = [*flat, *images, *volumes]
    for name, accepted in shapes.items():
        # Without IN, which has one number for its variance in (N, C).
        layer = build_norm_layer(dict(type=name, normalizers=('LN', 'BN')), 4)[1]
        for shape in shapes['SSN']:
            if shape in accepted:
                assert layer(torch.randn(shape)).shape == shape
            else:
                with pytest.raises(ValueError, match='x: got shape'):
                    layer(torch.randn(shape))


@pytest.mark.parametrize('name', ['SSN', 'SN'])
def test_conv_module(scope, name):
    module = ConvModule(3, 4, 3, norm_cfg=dict(type=name), act_cfg=dict(type='ReLU'))
    assert module.conv.bias is None
    assert module.norm_name == 'sn'
    assert type(module.norm) is LAYERS[name]
    with torch.no_grad():
        module.norm.weight.fill_(7.0)
        module.norm.bias.fill_(7.0)
    module.init_weights()
    assert module.norm.weight.tolist() == [1.0] * 4
    assert module.norm.bias.tolist() == [0.0] * 4
    assert module.norm.mean_weight.tolist() == [0.0] * 3
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(module(x), module.norm(module.conv(x)).relu())


@pytest.mark.parametrize('kind', [SSN, SyncSSN, SN], ids=['SSN', 'SyncSSN', 'SN'])
def test_checks_for_batchnorm_leave_the_layer_alone(kind):
    """Fusion and conversions would silently turn it into something else."""
    torch.manual_seed(0)
    model = nn.Sequential(
        ConvModule(3, 4, 3, norm_cfg=dict(type=kind.__name__)),
        ConvModule(4, 4, 3, norm_cfg=dict(type='BN')),
    )
    model(torch.randn(4, 3, 8, 8))
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    layer, expected, between = model[0].norm, model(x), model[0](x)
    assert not is_norm(layer)
    converted = []
    for convert in (
        convert_sync_batchnorm,
        revert_sync_batchnorm,
        nn.SyncBatchNorm.convert_sync_batchnorm,
        revert_sync_batchnorm,
        fuse_conv_bn,
    ):
        model = convert(model)
        converted.append(type(model[1].norm).__name__)
        assert model[0].norm is layer, convert
        assert type(layer) is kind, convert
        assert torch.equal(model[0](x), between), convert
    # They did what they are for to the layer beside it.
    assert converted == ['SyncBatchNorm', '_BatchNormXd'] * 2 + ['Identity']
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- registries


@pytest.mark.parametrize(
    ('registry', 'name', 'expected'),
    [
        (HOOKS, 'SSNRadiusHook', SSNRadiusHook),
        (HOOKS, 'SSNRatioHook', SSNRatioHook),
        (OPTIM_WRAPPER_CONSTRUCTORS, 'SSNOptimWrapperConstructor', SSNOptimWrapperConstructor),
        *((MODELS, name, layer) for name, layer in LAYERS.items()),
    ],
)
def test_root_registry(scope, registry, name, expected):
    assert registry.module_dict[name] is expected
    with registry.switch_scope_and_registry(None) as current:
        assert current.get(name) is expected


@pytest.mark.parametrize('codebase', ['mmdet', 'mmseg'])
def test_child_registries_find_them(codebase):
    child = pytest.importorskip(f'{codebase}.registry')
    for name, layer in LAYERS.items():
        assert child.MODELS.get(name) is layer
    assert child.HOOKS.get('SSNRadiusHook') is SSNRadiusHook
    assert child.OPTIM_WRAPPER_CONSTRUCTORS.get('SSNOptimWrapperConstructor') is (
        SSNOptimWrapperConstructor
    )


def test_public_names():
    assert set(ssn_plugin.__all__) >= {*LAYERS, 'set_radius', 'sparsestmax', 'switchable_norm'}
    assert all(hasattr(ssn_plugin, name) for name in ssn_plugin.__all__)


# ---------------------------------------------------------------- importing


def test_custom_imports_of_a_config_twice(tmp_path):
    """In a fresh interpreter that knows the plugin by its config alone."""
    config = tmp_path / 'config.py'
    config.write_text(
        "custom_imports = dict(imports=['ssn_plugin'], allow_failed_imports=False)\n"
        "norm_cfg = dict(type='SSN')\n"
    )
    code = """
import importlib, json, sys
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
init_default_scope('mmdet')  # the scope of the moment must not matter
assert MODELS.get('SSN') is None
layers = []
for _ in range(2):
    cfg = Config.fromfile(sys.argv[1])
    layers.append(MODELS.get(cfg.norm_cfg.type))
import ssn_plugin
importlib.reload(ssn_plugin)
assert MODELS.module_dict['SSN'] is layers[0] is layers[1] is ssn_plugin.SSN
print(json.dumps(len([name for name in MODELS.module_dict if name == 'SSN'])))
"""
    assert run_python(code, config) == 1
    Config.fromfile(str(config))  # and here, where it is imported already
    assert MODELS.module_dict['SSN'] is SSN


# Hides distributions the way a missing installation does: no finder finds them.
WITHOUT = """
import json, sys
hidden = set(sys.argv[1].split())

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *arguments):
        if name.split('.')[0] in hidden:
            return None
        return self.finder.find_spec(name, *arguments)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import ssn_plugin
from mmengine.registry import MODELS, init_default_scope

def loaded():
    return sorted({'mmdet', 'mmseg'} & set(sys.modules))

def build(scope):
    if scope:
        init_default_scope(scope)
    cfg = dict(type='SSNResNet', depth=18, base_channels=4, stem_channels=4)
    try:
        return type(MODELS.build(cfg)).__module__
    except ImportError as error:
        return 'ImportError: ' + str(error)
"""


def test_import_with_both_codebases_missing():
    code = """
from mmcv.cnn import build_norm_layer
assert build_norm_layer(dict(type='SSN'), 4)[0] == 'sn'
print(json.dumps([build(None), build('mmdet'), build('mmseg')]))
"""
    results = run_python(WITHOUT + code, 'mmdet mmseg')
    assert all(result.startswith('ImportError') for result in results)
    assert 'mmdet' in results[1]
    assert 'mmseg' in results[2]


@pytest.mark.parametrize(('missing', 'present'), [('mmdet', 'mmseg'), ('mmseg', 'mmdet')])
def test_one_codebase_missing_and_the_other_imported_only_when_needed(missing, present):
    pytest.importorskip(present)
    code = f"""
from mmengine.registry import HOOKS
lazy = [loaded()]
MODELS.build(dict(type='SSN', num_features=4))
HOOKS.build(dict(type='SSNRadiusHook'))
lazy.append(loaded())
print(json.dumps([lazy, build(None), loaded(), build('{present}'), build('{missing}')]))
"""
    lazy, by_hand, modules, in_scope, in_missing_scope = run_python(WITHOUT + code, missing)
    assert lazy == [[], []]
    backbone = f'ssn_plugin.models.{present}_resnet'
    assert by_hand == in_scope == backbone
    assert modules == [present]
    assert in_missing_scope.startswith('ImportError')
    assert missing in in_missing_scope
