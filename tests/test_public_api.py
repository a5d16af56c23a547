"""The names users may rely on."""

import inspect

import pytest
from torch import nn

import ssn_plugin
from ssn_plugin import deploy, layers, training

NAMES = [
    'SN',
    'SSN',
    'SSN1d',
    'SSN2d',
    'SSN3d',
    'SelectedNorm',
    'SyncSSN',
    '__version__',
    'clip_control_gradients',
    'collapse_ssn',
    'config_path',
    'control_parameters',
    'convert_batch_norm',
    'convert_sync_ssn',
    'copy_selection',
    'find_foldable',
    'fold_batch_norms',
    'hold_ratios',
    'radius_at',
    'replace_statistics',
    'revert_sync_ssn',
    'set_radius',
    'sparsestmax',
    'ssn_parameter_groups',
    'switchable_norm',
    'undecided_layers',
]
# Parameters and defaults of what the documentation and configs write down.
SSN_SIGNATURE = (
    'num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, '
    "normalizers=('IN', 'LN', 'BN'), num_groups=32, correction=0"
)
SIGNATURES = {
    'sparsestmax': 'z, radius, dim=-1',
    'switchable_norm': (
        'x, mean_ratios, var_ratios, weight=None, bias=None, running_mean=None, running_var=None, '
        "training=True, momentum=0.1, eps=1e-05, normalizers=('IN', 'LN', 'BN'), num_groups=32, "
        'correction=0'
    ),
    'config_path': 'name',
    'set_radius': 'model, radius',
    'undecided_layers': 'model',
    'copy_selection': 'source, target',
    'replace_statistics': 'model, forward, batches',
    'radius_at': 'progress, begin=0.0, end=1.0, start_radius=0.0, end_radius=1.0',
    'control_parameters': 'model',
    'ssn_parameter_groups': 'model, lr, weight_decay=None, lr_mult=0.1, decay_mult=0.0',
    'clip_control_gradients': 'model, max_norm=1.0',
    'SSN': f'{SSN_SIGNATURE}, radius=0.0, device=None, dtype=None',
    'SSN1d': f'{SSN_SIGNATURE}, radius=0.0, device=None, dtype=None',
    'SSN2d': f'{SSN_SIGNATURE}, radius=0.0, device=None, dtype=None',
    'SSN3d': f'{SSN_SIGNATURE}, radius=0.0, device=None, dtype=None',
    'SyncSSN': f'{SSN_SIGNATURE}, radius=0.0, process_group=None, device=None, dtype=None',
    'SN': f'{SSN_SIGNATURE}, device=None, dtype=None',
    'convert_batch_norm': "model, bn_ratio=0.9, normalizers=('IN', 'LN', 'BN'), num_groups=32",
    'convert_sync_ssn': 'model, process_group=None',
    'revert_sync_ssn': 'model',
    'collapse_ssn': 'model, native=False, keep_undecided=False',
    'find_foldable': 'model, run',
    'fold_batch_norms': 'model, pairs',
    'hold_ratios': 'model',
    'SelectedNorm': (
        'num_features, mean_source, var_source, eps=1e-05, momentum=0.1, affine=True, '
        'track_running_stats=True, num_groups=32, correction=0, device=None, dtype=None'
    ),
}


def test_all():
    assert ssn_plugin.__all__ == NAMES
    assert all(hasattr(ssn_plugin, name) for name in NAMES)
    star = {}
    exec('from ssn_plugin import *', star)
    assert set(star) - {'__builtins__'} == set(NAMES)


def test_layers_offer_the_same_objects():
    elsewhere = {'__version__', 'config_path', 'sparsestmax', 'switchable_norm', *deploy.__all__}
    elsewhere |= {name for name in NAMES if hasattr(training, name)}
    assert set(layers.__all__) == set(NAMES) - elsewhere
    for name in layers.__all__:
        assert getattr(layers, name) is getattr(ssn_plugin, name)


@pytest.mark.parametrize('name', SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(ssn_plugin, name)).parameters.values()
    shown = [p.name if p.default is p.empty else f'{p.name}={p.default!r}' for p in parameters]
    assert ', '.join(shown) == SIGNATURES[name]
    # Nothing is swallowed.
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


def test_dimensional_variants_are_ssn():
    for name in ('SSN1d', 'SSN2d', 'SSN3d'):
        assert issubclass(getattr(ssn_plugin, name), ssn_plugin.SSN)
    assert not issubclass(ssn_plugin.SN, ssn_plugin.SSN)


def test_positional_arguments_are_those_of_batch_norm():
    shared = list(inspect.signature(nn.BatchNorm2d).parameters)[:5]
    assert list(inspect.signature(ssn_plugin.SSN).parameters)[:5] == shared
    assert (
        ssn_plugin.SSN(4, 1e-3, 0.2, False, False).momentum == nn.BatchNorm2d(4, 1e-3, 0.2).momentum
    )


def test_version():
    assert ssn_plugin.__version__.count('.') == 2
