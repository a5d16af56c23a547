"""The layers, on torch alone."""

from ssn_plugin.layers.convert import convert_batch_norm, convert_sync_ssn, revert_sync_ssn
from ssn_plugin.layers.radius import copy_selection, set_radius, undecided_layers
from ssn_plugin.layers.running_statistics import replace_statistics
from ssn_plugin.layers.selected_norm import SelectedNorm
from ssn_plugin.layers.ssn import SSN, SSN1d, SSN2d, SSN3d
from ssn_plugin.layers.switch_norm import SN
from ssn_plugin.layers.sync_ssn import SyncSSN

__all__ = [
    'SN',
    'SSN',
    'SSN1d',
    'SSN2d',
    'SSN3d',
    'SelectedNorm',
    'SyncSSN',
    'convert_batch_norm',
    'convert_sync_ssn',
    'copy_selection',
    'replace_statistics',
    'revert_sync_ssn',
    'set_radius',
    'undecided_layers',
]
