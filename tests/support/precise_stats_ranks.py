"""PreciseStatsHook's averages over processes, of SSN and of SyncSSN."""

import torch
from torch import nn

from ssn_plugin import SSN, convert_sync_ssn, replace_statistics


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), SSN(4), nn.ReLU(), nn.Conv2d(4, 3, 1), SSN(3))


def batches_of(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(2 + rank, 2, 6, 6, generator=generator) * (1 + rank) for _ in range(3)]


def averages(rank: int, world: int) -> list[torch.Tensor]:
    """Running statistics of one process, averaged over all."""
    model = network()
    replace_statistics(model, model, batches_of(rank))
    return [buffer for name, buffer in model.named_buffers() if 'running' in name]


def synchronised_averages(rank: int, world: int) -> list[torch.Tensor]:
    """The same with layers that share the statistics of every batch."""
    model = convert_sync_ssn(network())
    replace_statistics(model, model, shares_of(rank))
    return [buffer for name, buffer in model.named_buffers() if 'running' in name]


def shares_of(rank: int) -> list[torch.Tensor]:
    """As ``batches_of``; one batch that is NaN and one that is empty, each in one process alone."""
    batches = batches_of(rank)
    nan, empty = torch.full((1, 2, 6, 6), torch.nan), torch.empty(0, 2, 6, 6)
    return [batches[0], [empty, nan][rank], *batches[1:], [batches[0], empty][rank]]
