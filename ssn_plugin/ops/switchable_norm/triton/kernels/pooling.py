"""Statistics of samples, groups and channels from those of their rows.

``rows`` holds a mean and a variance per row. Where rows are split, ``partial`` holds means and sums
of squared distances per split of every row, and SPLITS, a power of two, is at least their number.
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
def sample_moments(
    rows, partial, n, N, C, S, chunk, splits, divisor,
    SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of LN for one sample, vectors of one."""
    lanes = tl.expand_dims(tl.arange(0, CHANNELS), 0)
    mean = tl.zeros((1, CHANNELS), tl.float32)
    m2 = tl.zeros((1, CHANNELS), tl.float32)
    count = 0.0
    for first in range(0, C, CHANNELS):
        c = first + lanes
        inside = c < C
        value, within = load_moments(
            rows, partial, n * C + c, inside, N, C, S, chunk, splits, divisor, SPLITS
        )
        count += 1.0
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += within + delta * (value - mean)
    total = C.to(tl.float32)
    mean, m2 = merge_lanes(mean, m2, lane_counts(C, lanes, CHANNELS), total, 1)
    return mean, m2 / total


@triton.jit
def group_moments(
    rows, partial, n, g, N, C, G, S, chunk, splits, divisor,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of GN for the groups ``g`` of one sample."""
    size = C // G
    lanes = tl.expand_dims(tl.arange(0, CHANNELS), 0)
    mean = tl.zeros((GROUPS, CHANNELS), tl.float32)
    m2 = tl.zeros((GROUPS, CHANNELS), tl.float32)
    count = 0.0
    for first in range(0, size, CHANNELS):
        member = first + lanes
        inside = tl.expand_dims(g < G, 1) & (member < size)
        at = n * C + tl.expand_dims(g * size, 1) + member
        value, within = load_moments(
            rows, partial, at, inside, N, C, S, chunk, splits, divisor, SPLITS
        )
        count += 1.0
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += within + delta * (value - mean)
    total = size.to(tl.float32)
    mean, m2 = merge_lanes(mean, m2, lane_counts(size, lanes, CHANNELS), total, 1)
    return mean, m2 / total


@triton.jit
def channel_moments(
    rows, partial, c, exists, N, C, S, chunk, splits, divisor,
    SPLITS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of BN for the channels ``c``."""
    lanes = tl.expand_dims(tl.arange(0, SAMPLES), 1)
    mean = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    m2 = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    count = 0.0
    for first in range(0, N, SAMPLES):
        n = first + lanes
        inside = (n < N) & tl.expand_dims(exists, 0)
        at = n * C + tl.expand_dims(c, 0)
        value, within = load_moments(
            rows, partial, at, inside, N, C, S, chunk, splits, divisor, SPLITS
        )
        count += 1.0
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += within + delta * (value - mean)
    total = N.to(tl.float32)
    mean, m2 = merge_lanes(mean, m2, lane_counts(N, lanes, SAMPLES), total, 0)
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
def sample_gradients(
    sums, n, N, C, splits, SPLITS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Means over one sample of the gradients of mean and variance, vectors of one."""
    lanes = tl.expand_dims(tl.arange(0, CHANNELS), 0)
    dmean = tl.zeros((1, CHANNELS), tl.float32)
    dvar = tl.zeros((1, CHANNELS), tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + lanes
        dmean += load_sums(sums, 0, n * C + c, c < C, N, C, splits, SPLITS)
        dvar += load_sums(sums, 1, n * C + c, c < C, N, C, splits, SPLITS)
    return tl.sum(dmean, 1) / C, tl.sum(dvar, 1) / C


@triton.jit
def group_gradients(
    sums, n, g, N, C, G, splits,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The same over the groups ``g`` of one sample."""
    size = C // G
    lanes = tl.expand_dims(tl.arange(0, CHANNELS), 0)
    dmean = tl.zeros((GROUPS, CHANNELS), tl.float32)
    dvar = tl.zeros((GROUPS, CHANNELS), tl.float32)
    for first in range(0, size, CHANNELS):
        member = first + lanes
        inside = tl.expand_dims(g < G, 1) & (member < size)
        at = n * C + tl.expand_dims(g * size, 1) + member
        dmean += load_sums(sums, 0, at, inside, N, C, splits, SPLITS)
        dvar += load_sums(sums, 1, at, inside, N, C, splits, SPLITS)
    return tl.sum(dmean, 1) / size, tl.sum(dvar, 1) / size


@triton.jit
def channel_sums(
    sums, number: tl.constexpr, c, exists, N, C, splits,
    SPLITS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A number of :func:`load_sums` added up over the batch, for the channels ``c``."""
    lanes = tl.expand_dims(tl.arange(0, SAMPLES), 1)
    total = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    for first in range(0, N, SAMPLES):
        n = first + lanes
        inside = (n < N) & tl.expand_dims(exists, 0)
        at = n * C + tl.expand_dims(c, 0)
        total += load_sums(sums, number, at, inside, N, C, splits, SPLITS)
    return tl.sum(total, 0)
