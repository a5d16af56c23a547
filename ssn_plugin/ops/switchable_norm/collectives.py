"""BN's statistics over several processes: one all-reduce forward and one backward.

Processes may hold different numbers of samples and positions, or none. README.md beside this file
has the derivation.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ssn_plugin.ops.switchable_norm.statistics import BatchStatistics, Moments, pool_total


class BatchMoments(NamedTuple):
    """Moments of every channel over all processes of a group.

    Attributes:
        count: Elements per channel, 0-d.
        mean: Shape (C,).
        var: Shape (C,).
    """

    count: Tensor
    mean: Tensor
    var: Tensor


def _meeting_place(tensor: Tensor) -> torch.device:
    """Where processes reduce it: MPS has neither collectives nor float64, so there the CPU."""
    return torch.device('cpu') if tensor.device.type == 'mps' else tensor.device


def all_reduce_moments(rows: Moments, length: int, group: dist.ProcessGroup) -> BatchMoments:
    """Moments over all rows of all processes, each weighted by the elements of its row.

    One all-reduce of 2 C + 1 numbers: count, sum and sum of squares. In float64, where the
    difference of the last two costs no digits that float32 has, and summed by the collective, so
    that every process gets the same bits.

    Args:
        rows: Moments of this process's rows, (N, C), the variance corrected; N may be zero.
        length: Elements per row.
        group: The processes.
    """
    place = _meeting_place(rows.mean)
    mean = rows.mean.to(place).double()
    square = mean.square()
    if rows.var is not None:
        square += rows.var.to(place)
    count = mean.new_full((1,), len(mean) * length)
    totals = torch.cat((count, mean.sum(0) * length, square.sum(0) * length))
    dist.all_reduce(totals, group=group)
    count, totals = totals[0], totals[1:] / totals[0].clamp(min=1)
    mean, square = totals.view(2, -1)
    var = (square - mean.square()).clamp_(min=0)
    return BatchMoments(*(part.to(rows.mean) for part in (count, mean, var)))


def all_reduce_gradients(grad: Moments, count: Tensor, group: dist.ProcessGroup) -> Moments:
    """Per element of the batch, the sums over all rows of all processes; one all-reduce.

    Args:
        grad: Gradients of this process's rows, (N, C) each; N may be zero.
        count: Elements per channel over all processes, 0-d.
        group: The processes.

    Returns:
        Both summed and divided by ``count``, (C,).
    """
    totals = torch.cat([pool_total(part, 'BN', 1) for part in grad])
    joined = totals.to(_meeting_place(totals))
    dist.all_reduce(joined, group=group)
    return Moments(*(joined.to(totals) / count.clamp(min=1)).view(2, -1))


def track(
    running: Moments, joined: BatchMoments, momentum: float | Tensor, correction: int
) -> None:
    """Update running statistics in place; a batch that is empty everywhere leaves them alone.

    Args:
        running: Shape (C,) each.
        joined: The new values.
        momentum: Weight of the new value.
        correction: 0 to turn the variance into the unbiased one; 1 if it stays as it is.
    """
    count, mean, var = joined
    running_mean, running_var = running
    if correction == 0:
        # Where count is so large that float32 cannot represent count - 1, the factor has already
        # rounded to one, so the lost unit does not matter.
        var = var * (count / (count - 1).clamp(min=1))
    weight = (count > 0).to(running_mean.dtype) * momentum
    running_mean.lerp_(mean.to(running_mean.dtype), weight)
    running_var.lerp_(var.to(running_var.dtype), weight)


class EmptyShareFunction(torch.autograd.Function):
    """The part in both collectives of a process without elements; x passes as it is."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        batch: BatchStatistics,
        correction: int,
        group: dist.ProcessGroup,
        shares_gradients: bool,
    ) -> Tensor:
        """Add nothing to the batch, and track what the others hold.

        ``shares_gradients`` says whether the others reduce gradients in their backward pass.
        """
        nothing = x.new_empty(0, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        joined = all_reduce_moments(Moments(nothing, None), 0, group)
        if batch.tracked is not None:
            track(batch.tracked, joined, batch.momentum, correction)
        ctx.group = group if shares_gradients else None
        ctx.save_for_backward(nothing, joined.count)
        return x.clone()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient passes as it is."""
        if ctx.group is not None:
            nothing, count = ctx.saved_tensors
            all_reduce_gradients(Moments(nothing, nothing), count, ctx.group)
        return dy, *(None,) * 4


def refuse_second_derivatives() -> None:
    """Say that there are none over several processes, and who has them."""
    raise RuntimeError(
        'SyncSSN: got a backward pass with create_graph=True, expected one without: second '
        'derivatives over several processes are not there; revert_sync_ssn(model) has them'
    )
