"""Candidates with few values where processes see other inputs."""

import torch
from torch import nn

from ssn_plugin import SSN, SyncSSN
from ssn_plugin.layers.few_values import FewValues


def left_out(rank: int, world: int) -> dict[str, list[str]]:
    """By least=16, of layers with up to 20 values in one process alone, 10 in each, and none."""
    model = nn.ModuleDict(
        {
            'large_in_one': SSN(4, normalizers=('LN', 'GN', 'BN')),
            'small': SSN(4, normalizers=('LN', 'GN', 'BN')),
            'shared': SyncSSN(4, normalizers=('LN', 'GN', 'BN')),
            'called_in_one': SSN(4, normalizers=('LN', 'GN', 'BN')),
            'never_called': SSN(4, normalizers=('LN', 'GN', 'BN')),
        }
    )
    few = FewValues(model, least=16)
    model['large_in_one'](torch.randn(2, 4, 2, 5 - 4 * rank))
    model['small'](torch.randn(2, 4, 1, 5))
    model['shared'](torch.randn(2, 4, 1, 5))
    if rank:
        model['called_in_one'](torch.randn(2, 4, 1, 1))
    return few.leave_out()
