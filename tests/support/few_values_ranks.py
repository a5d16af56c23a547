"""Candidates with few values where processes see other inputs."""

import torch
from torch import nn

from ssn_plugin import SSN, SyncSSN
from ssn_plugin.layers.few_values import FewValues


def left_out(rank: int, world: int) -> list:
    """By least=16, of layers with up to 20 values in one process alone, 10 in each, and none.

    Returns:
        What the first call leaves out, what the second does, and what waits even then.
    """
    names = 'large_in_one', 'small', 'called_in_one', 'called_later_in_one', 'frozen_at_first'
    model = nn.ModuleDict(
        {name: SSN(4, normalizers=('LN', 'GN', 'BN')) for name in (*names, 'never_called')}
    )
    model['shared'] = SyncSSN(4, normalizers=('LN', 'GN', 'BN'))
    model['frozen_at_first'].requires_grad_(False)
    few = FewValues(model, least=16)
    model['large_in_one'](torch.randn(2, 4, 2, 5 - 4 * rank))
    model['small'](torch.randn(2, 4, 1, 5))
    model['shared'](torch.randn(2, 4, 1, 5))
    model['frozen_at_first'](torch.randn(2, 4, 1, 1))
    if rank:
        model['called_in_one'](torch.randn(2, 4, 1, 1))
    found = [few.leave_out()]
    model['frozen_at_first'].requires_grad_(True)
    if rank:
        model['called_later_in_one'](torch.randn(2, 4, 1, 1))
    return [*found, few.leave_out(), few.unreached()]
