"""PreciseStatsHook's averages over two processes of their own."""

import torch
from torch import nn

from ssn_plugin import SSN
from ssn_plugin.engine.precise_stats_hook import replace_statistics


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
