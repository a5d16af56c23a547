"""Sparse Switchable Normalization for MMDetection and MMSegmentation.

``custom_imports = dict(imports=['ssn_plugin'])`` in a config registers the layers ('SSN', 'SSN1d',
'SSN2d', 'SSN3d', 'SyncSSN', 'SN'), the backbone 'SSNResNet', the classifier head
'DropoutLinearClsHead', the builders 'ConvertedSSN' and 'CollapsedSSN', the hooks 'SSNRadiusHook',
'SSNRatioHook', 'SSNResumeHook', 'SSNCheckpointHook' and 'PreciseStatsHook', and the constructor
'SSNOptimWrapperConstructor'.
"""

from importlib.util import find_spec

from ssn_plugin.deploy.collapse import collapse_ssn
from ssn_plugin.deploy.constant_ratios import hold_ratios
from ssn_plugin.deploy.fold import find_foldable, fold_batch_norms
from ssn_plugin.functional import sparsestmax, switchable_norm
from ssn_plugin.layers.convert import convert_batch_norm, convert_sync_ssn, revert_sync_ssn
from ssn_plugin.layers.radius import copy_selection, set_radius, undecided_layers
from ssn_plugin.layers.running_statistics import replace_statistics
from ssn_plugin.layers.selected_norm import SelectedNorm
from ssn_plugin.layers.ssn import SSN, SSN1d, SSN2d, SSN3d
from ssn_plugin.layers.switch_norm import SN
from ssn_plugin.layers.sync_ssn import SyncSSN
from ssn_plugin.shipped import config_path
from ssn_plugin.training import (
    clip_control_gradients,
    control_parameters,
    radius_at,
    ssn_parameter_groups,
)
from ssn_plugin.version import __version__

try:
    _has_mmengine = find_spec('mmengine') is not None
except ModuleNotFoundError:  # where an import hook hides it
    _has_mmengine = False
if _has_mmengine:  # the layers and functions need torch alone
    from ssn_plugin.engine import registration as _registration  # noqa: F401  (by being imported)

__all__ = [
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
