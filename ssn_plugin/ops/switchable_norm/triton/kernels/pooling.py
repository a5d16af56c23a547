"""Statistics of samples, groups and channels from those of their rows.

A pool is ``size`` rows from row ``first`` on, ``stride`` apart; ``first`` is a vector, and
``exists`` says which of its pools there are. ``rows`` holds a mean and a variance per row. Where
rows are split, ``partial`` holds means and sums of squared distances per split of every row, and
SPLITS, a power of two, is at least their number. MEMBERS rows of each pool are read at once.
"""

import triton
import triton.language as tl

from ssn_plugin.ops.switchable_norm.triton.kernels.tiles import lane_counts, merge_lanes


@triton.jit
def load_moments(
    rows, partial, at, inside, N, C, S, chunk, splits, divisor, SPLITS: tl.constexpr
):  # fmt: skip
    """Mean and variance of the rows ``at``, a matrix of row numbers."""
    size = N * C
    if SPLITS == 1:
        mean = tl.load(rows + at, mask=inside, other=0)
        var = tl.load(rows + size + at, mask=inside, other=0)
    else:
        split = tl.expand_dims(tl.expand_dims(tl.arange(0, SPLITS), 1), 2)
        there = tl.expand_dims(inside, 0) & (split < splits)
        at = tl.expand_dims(at, 0) + split * size
        mean = tl.load(partial + at, mask=there, other=0)
        m2 = tl.load(partial + splits * size + at, mask=there, other=0)
        counts = tl.minimum(tl.maximum(S - split * chunk, 0), chunk).to(tl.float32)
        mean, m2 = merge_lanes(mean, m2, counts, S.to(tl.float32), 0)
        var = m2 / divisor
    return mean, var


@triton.jit
def pooled_moments(
    rows, partial, first, exists, stride, size, N, C, S, chunk, splits, divisor,
    SPLITS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of every pool, by Welford's recurrence."""
    lanes = tl.expand_dims(tl.arange(0, MEMBERS), 0)
    mean = tl.zeros((exists.shape[0], MEMBERS), tl.float32)
    m2 = tl.zeros((exists.shape[0], MEMBERS), tl.float32)
    count = 0.0
    for start in range(0, size, MEMBERS):
        member = start + lanes
        inside = tl.expand_dims(exists, 1) & (member < size)
        at = tl.expand_dims(first, 1) + member * stride
        value, within = load_moments(
            rows, partial, at, inside, N, C, S, chunk, splits, divisor, SPLITS
        )
        count += 1.0
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += within + delta * (value - mean)
    total = size.to(tl.float32)
    mean, m2 = merge_lanes(mean, m2, lane_counts(size, lanes, MEMBERS), total, 1)
    return mean, m2 / total


@triton.jit
def load_sums(sums, number: tl.constexpr, at, inside, N, C, splits, SPLITS: tl.constexpr):
    """One of the numbers that the backward pass has per split of a row, added up per row.

    ``at`` is a matrix of row numbers; the numbers are the gradients of mean and variance, the sum
    of dy and that of dy times the normalised x.
    """
    size = N * C
    base = sums + number * splits * size
    if SPLITS == 1:
        return tl.load(base + at, mask=inside, other=0)
    else:
        split = tl.expand_dims(tl.expand_dims(tl.arange(0, SPLITS), 1), 2)
        there = tl.expand_dims(inside, 0) & (split < splits)
        return tl.sum(tl.load(base + tl.expand_dims(at, 0) + split * size, mask=there, other=0), 0)


@triton.jit
def pooled_sums(
    sums, number: tl.constexpr, first, exists, stride, size, N, C, splits,
    SPLITS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """That number of :func:`load_sums` and the next one, added up over every pool."""
    lanes = tl.expand_dims(tl.arange(0, MEMBERS), 0)
    total = tl.zeros((exists.shape[0], MEMBERS), tl.float32)
    following = tl.zeros((exists.shape[0], MEMBERS), tl.float32)
    for start in range(0, size, MEMBERS):
        member = start + lanes
        inside = tl.expand_dims(exists, 1) & (member < size)
        at = tl.expand_dims(first, 1) + member * stride
        total += load_sums(sums, number, at, inside, N, C, splits, SPLITS)
        following += load_sums(sums, number + 1, at, inside, N, C, splits, SPLITS)
    return tl.sum(total, 1), tl.sum(following, 1)
