"""Forward: row moments, pooling and ratios, the affine pass."""

import triton
import triton.language as tl

from ssn_plugin.ops.switchable_norm.triton.kernels.candidates import (
    load_candidate,
    load_gain,
    mix,
    saved_sections,
)
from ssn_plugin.ops.switchable_norm.triton.kernels.ratios import write_ratios
from ssn_plugin.ops.switchable_norm.triton.kernels.tiles import (
    SHAPES,
    align_shape,
    lane_counts,
    merge_lanes,
    position_range,
    row_block,
    tile_offsets,
    tile_start,
    zero_tile,
)


@triton.jit(do_not_specialize=SHAPES)
def ssn_fwd_moments_kernel(
    x, out, N, C, S, tiles, splits, divisor,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Row moments of ``tiles`` tiles of positions: means, then sums of squares / ``divisor``."""
    size = N.to(tl.int64) * C
    C, S = align_shape(C, S, AXIS, ALIGN)
    split = tl.program_id(0) % splits
    row, _n, _c, exists, origin, offset = row_block(
        tl.program_id(0) // splits, N.to(tl.int64), C, S, ROWS, AXIS
    )
    first, last = position_range(split, S, tiles, POSITIONS)
    lanes, offsets = tile_offsets(offset, C, POSITIONS, AXIS)
    there = tl.expand_dims(exists, AXIS)
    # Welford per lane: neither a large mean nor an outlier costs digits.
    mean = zero_tile(ROWS, POSITIONS, AXIS)
    m2 = zero_tile(ROWS, POSITIONS, AXIS)
    count = 0.0
    for position in range(first, last, POSITIONS):
        inside = there & (lanes < S - position)
        at = tile_start(origin, position, C, AXIS)
        value = tl.load(x + at + offsets, mask=inside, other=0).to(tl.float32)
        count += 1.0
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += delta * (value - mean)
    counts = lane_counts(last - first, lanes, POSITIONS)
    mean, m2 = merge_lanes(mean, m2, counts, (last - first).to(tl.float32), AXIS)
    tl.store(out + split * size + row, mean, mask=exists)
    tl.store(out + (splits + split) * size + row, m2 / divisor, mask=exists)


@triton.jit(do_not_specialize=SHAPES)
def ssn_fwd_merge_kernel(
    partial, out, N, C, S, tiles, splits, divisor,
    POSITIONS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Moments of whole rows from those of their splits (Chan's formula)."""
    size = N.to(tl.int64) * C
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < size
    chunk = tiles.to(tl.int64) * POSITIONS
    count = tl.zeros((SPLITS, 1), tl.float32)
    mean = tl.zeros((SPLITS, ROWS), tl.float32)
    m2 = tl.zeros((SPLITS, ROWS), tl.float32)
    for first in range(0, splits, SPLITS):
        split = tl.expand_dims(first + tl.arange(0, SPLITS), 1)
        inside = (split < splits) & tl.expand_dims(exists, 0)
        at = split * size + tl.expand_dims(row, 0)
        other_mean = tl.load(partial + at, mask=inside, other=0)
        other_m2 = tl.load(partial + splits * size + at, mask=inside, other=0)
        other = tl.minimum(tl.maximum(S - split * chunk, 0), chunk).to(tl.float32)
        share = other / tl.maximum(count + other, 1.0)
        delta = other_mean - mean
        mean += delta * share
        m2 += other_m2 + delta * delta * (count * share)
        count += other
    mean, m2 = merge_lanes(mean, m2, count, S.to(tl.float32), 0)
    tl.store(out + row, mean, mask=exists)
    tl.store(out + size + row, m2 / divisor, mask=exists)


@triton.jit
def _pool_sample(
    saved, n, N, C, G,
    LN: tl.constexpr, GN: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """LN and GN statistics of one sample; LN pools the groups where there are groups."""
    rows, _, samples, groups = saved_sections(saved, N, C, G, True)
    count = 1
    if GN:
        count = G
    size = C // count
    group_lanes = tl.arange(0, GROUPS)
    channel_lanes = tl.expand_dims(tl.arange(0, CHANNELS), 0)
    counts = lane_counts(size, channel_lanes, CHANNELS)
    all_mean = tl.zeros((GROUPS,), tl.float32)
    all_m2 = tl.zeros((GROUPS,), tl.float32)
    step = 0.0
    for first in range(0, count, GROUPS):
        g = first + group_lanes
        exists = g < count
        mean = tl.zeros((GROUPS, CHANNELS), tl.float32)
        m2 = tl.zeros((GROUPS, CHANNELS), tl.float32)
        inner = 0.0
        for start in range(0, size, CHANNELS):
            c = start + channel_lanes
            inside = tl.expand_dims(exists, 1) & (c < size)
            at = n * C + tl.expand_dims(g * size, 1) + c
            value = tl.load(rows + at, mask=inside, other=0)
            within = tl.load(rows + N * C + at, mask=inside, other=0)
            inner += 1.0
            delta = tl.where(inside, value - mean, 0.0)
            mean += delta * (1.0 / inner)
            m2 += within + delta * (value - mean)
        total = size.to(tl.float32)
        group_mean, group_m2 = merge_lanes(mean, m2, counts, total, 1)
        group_var = group_m2 / total
        if GN:
            tl.store(groups + n * G + g, group_mean, mask=exists)
            tl.store(groups + N * G + n * G + g, group_var, mask=exists)
        step += 1.0
        delta = tl.where(exists, group_mean - all_mean, 0.0)
        all_mean += delta * (1.0 / step)
        all_m2 += group_var + delta * (group_mean - all_mean)  # of no group: zero
    if LN:
        # As one row of lanes: a reduction of a vector leaves no axis to expand.
        all_mean, all_m2 = merge_lanes(
            tl.expand_dims(all_mean, 0),
            tl.expand_dims(all_m2, 0),
            tl.expand_dims(lane_counts(count, group_lanes, GROUPS), 0),
            count * 1.0,
            1,
        )
        one = tl.arange(0, 1)
        tl.store(samples + n + one, all_mean)
        tl.store(samples + N + n + one, all_m2 / count)


@triton.jit
def _pool_channels(
    saved, running_mean, running_var, momentum, unbias, block, N, C, G,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, MOMENTUM_TENSOR: tl.constexpr,
):  # fmt: skip
    """BN statistics of one block of channels, and the running statistics."""
    rows, channels, _, _ = saved_sections(saved, N, C, G, True)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < C
    lanes = tl.expand_dims(tl.arange(0, SAMPLES), 1)
    mean = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    m2 = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    count = 0.0
    for first in range(0, N, SAMPLES):
        n = first + lanes
        inside = (n < N) & tl.expand_dims(exists, 0)
        at = n.to(tl.int64) * C + tl.expand_dims(c, 0)
        value = tl.load(rows + at, mask=inside, other=0)
        within = tl.load(rows + N * C + at, mask=inside, other=0)
        count += 1.0
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += within + delta * (value - mean)
    total = N.to(tl.float32)
    mean, m2 = merge_lanes(mean, m2, lane_counts(N, lanes, SAMPLES), total, 0)
    var = m2 / total
    tl.store(channels + c, mean, mask=exists)
    tl.store(channels + C + c, var, mask=exists)
    if running_mean is not None:
        new = tl.load(momentum).to(tl.float32) if MOMENTUM_TENSOR else momentum
        _lerp(running_mean + c, mean, new, exists)
        _lerp(running_var + c, var * unbias, new, exists)


@triton.jit
def _lerp(pointer, end, weight, mask):
    """Move what is stored toward ``end``, as ``Tensor.lerp_`` does: exactly there for weight 1."""
    start = tl.load(pointer, mask=mask, other=0).to(tl.float32)
    far = end + (start - end) * (1 - weight)
    value = tl.where(weight + tl.zeros_like(end) < 0.5, start + weight * (end - start), far)
    tl.store(pointer, value, mask=mask)


@triton.jit(do_not_specialize=SHAPES)
def ssn_fwd_pool_kernel(
    saved, mean_control, var_control, radius, mean_fixed, var_fixed, mean_choice, var_choice,
    running_mean, running_var, momentum, unbias, limit, one_hot_from, max_slope,
    N, C, G, samples, blocks,
    K: tl.constexpr, MAP: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr,
    LN: tl.constexpr, GN: tl.constexpr, BATCH: tl.constexpr, MOMENTUM_TENSOR: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program per sample, per block of channels, and one for both ratio vectors."""
    N = N.to(tl.int64)
    program = tl.program_id(0)
    if program < samples:
        if LN or GN:
            _pool_sample(saved, program.to(tl.int64), N, C, G, LN, GN, GROUPS, GROUP_CHANNELS)
    elif program < samples + blocks:
        if BATCH:
            _pool_channels(
                saved, running_mean, running_var, momentum, unbias, program - samples,
                N, C, G, SAMPLES, CHANNELS, MOMENTUM_TENSOR,
            )  # fmt: skip
    else:
        if MEAN < 0:
            write_ratios(
                saved, mean_control, radius, mean_fixed, mean_choice,
                limit, one_hot_from, max_slope, K, MAP,
            )  # fmt: skip
        if VAR < 0:
            write_ratios(
                saved + 16, var_control, radius, var_fixed, var_choice,
                limit, one_hot_from, max_slope, K, MAP,
            )  # fmt: skip


@triton.jit
def _row_affine(
    saved, weight, bias, running_mean, running_var, row, n, c, exists, N, C, G, eps,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Gain and shift of ``y = (x - centre) * gain + shift``, and the centre.

    x meets its own row's mean first: distances from it cost no digits however large it is.
    """
    mean, var = mix(
        saved, running_mean, running_var, row, n, c, exists, N, C, G, KINDS, MEAN, VAR, HAS_ROWS
    )
    _, gain = load_gain(var, weight, c, exists, eps)
    centre = mean
    if HAS_ROWS:
        centre = tl.load(saved + 32 + row, mask=exists, other=0)
    shift = gain * (centre - mean)
    if bias is not None:
        shift += tl.load(bias + c, mask=exists, other=0).to(tl.float32)
    if running_mean is not None:
        # The backward pass needs them as they are now.
        batch_mean, batch_var = load_candidate(
            2, saved, running_mean, running_var, row, n, c, exists, N, C, G, HAS_ROWS
        )
        _, channels, _, _ = saved_sections(saved, N, C, G, HAS_ROWS)
        tl.store(channels + c, batch_mean, mask=exists & (n == 0))
        tl.store(channels + C + c, batch_var, mask=exists & (n == 0))
    return centre, gain, shift


@triton.jit(do_not_specialize=SHAPES)
def ssn_fwd_affine_kernel(
    saved, affine, weight, bias, running_mean, running_var, N, C, G, eps,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Gain and shift of every row, where rows are too short to compute them in the pass over x."""
    N = N.to(tl.int64)
    row, n, c, exists, _origin, _offset = row_block(tl.program_id(0), N, C, 1, ROWS, 1)
    _, gain, shift = _row_affine(
        saved, weight, bias, running_mean, running_var, row, n, c, exists, N, C, G, eps,
        KINDS, MEAN, VAR, HAS_ROWS,
    )  # fmt: skip
    tl.store(affine + row, gain, mask=exists)
    tl.store(affine + N * C + row, shift, mask=exists)


@triton.jit(do_not_specialize=SHAPES)
def ssn_fwd_apply_kernel(
    x, y, saved, affine, weight, bias, running_mean, running_var, N, C, S, G, tiles, splits, eps,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``y = (x - centre) * gain + shift``, with gain and shift read or computed per row."""
    N = N.to(tl.int64)
    C, S = align_shape(C, S, AXIS, ALIGN)
    # From the end: what the moments pass read last is the likeliest to be in the cache still.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row, n, c, exists, origin, offset = row_block(program // splits, N, C, S, ROWS, AXIS)
    first, last = position_range(program % splits, S, tiles, POSITIONS)
    lanes, offsets = tile_offsets(offset, C, POSITIONS, AXIS)
    if affine is not None:
        centre = tl.load(saved + 32 + row, mask=exists, other=0)
        gain = tl.load(affine + row, mask=exists, other=0)
        shift = tl.load(affine + N * C + row, mask=exists, other=0)
    else:
        centre, gain, shift = _row_affine(
            saved, weight, bias, running_mean, running_var, row, n, c, exists, N, C, G, eps,
            KINDS, MEAN, VAR, HAS_ROWS,
        )  # fmt: skip
    there = tl.expand_dims(exists, AXIS)
    centre = tl.expand_dims(centre, AXIS)
    gain = tl.expand_dims(gain, AXIS)
    shift = tl.expand_dims(shift, AXIS)
    for position in range(first, last, POSITIONS):
        inside = there & (lanes < S - position)
        at = tile_start(origin, position, C, AXIS)
        value = tl.load(x + at + offsets, mask=inside, other=0).to(tl.float32)
        tl.store(y + at + offsets, (value - centre) * gain + shift, mask=inside)
