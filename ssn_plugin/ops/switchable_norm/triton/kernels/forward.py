"""Forward: row moments and ratios, pooling, the affine pass."""

import triton
import triton.language as tl

from ssn_plugin.ops.switchable_norm.triton.kernels.candidates import (
    load_gain,
    load_saved,
    mix,
    saved_sections,
)
from ssn_plugin.ops.switchable_norm.triton.kernels.pooling import (
    channel_moments,
    group_moments,
    load_moments,
    sample_moments,
)
from ssn_plugin.ops.switchable_norm.triton.kernels.ratios import write_ratios
from ssn_plugin.ops.switchable_norm.triton.kernels.tiles import (
    SHAPES,
    align_shape,
    hand_over,
    lane_counts,
    merge_lanes,
    position_range,
    row_block,
    tile_offsets,
    tile_start,
    widened,
    zero_tile,
)


@triton.jit
def _load_rows(x, there, S, AXIS: tl.constexpr):
    """Rows that are one tile, their means and their sums of squared distances from those."""
    value = tl.load(x, mask=there, other=0).to(tl.float32)
    mean, m2 = merge_lanes(
        value, tl.zeros_like(value), there.to(tl.float32), S.to(tl.float32), AXIS
    )
    return value, mean, m2


@triton.jit
def _row_moments(
    x, saved, partial, program, N, C, S, tiles, splits, divisor,
    SHORT: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    split = program % splits
    row, _n, _c, exists, _sample, origin, offset = row_block(program // splits, N, C, S, ROWS, AXIS)
    first, last = position_range(split, N, S, tiles, SHORT, POSITIONS)
    lanes, offsets = tile_offsets(offset, C, POSITIONS, AXIS)
    there = tl.expand_dims(exists, AXIS)
    if SHORT:
        _, mean, m2 = _load_rows(x + origin + offsets, there & (lanes < S), S, AXIS)
    else:
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
    if partial is None:
        tl.store(saved + 32 + row, mean, mask=exists)
        tl.store(saved + 32 + N * C + row, m2 / divisor, mask=exists)
    else:
        tl.store(partial + split * N * C + row, mean, mask=exists)
        tl.store(partial + (splits + split) * N * C + row, m2, mask=exists)


@triton.jit(do_not_specialize=SHAPES)
def ssn_fwd_moments_kernel(
    x, saved, partial,
    mean_control, var_control, radius, mean_fixed, var_fixed, mean_choice, var_choice,
    limit, one_hot_from, max_slope, N, C, S, tiles, splits, divisor,
    K: tl.constexpr, MAP: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr,
    RATIOS: tl.constexpr, SHORT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Moments of every row, or of every split of it; one more program makes the ratios."""
    N = widened(N, WIDE)
    C, S = align_shape(C, S, AXIS, ALIGN)
    program = tl.program_id(0) - RATIOS
    if program < 0:
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
    else:
        _row_moments(
            x, saved, partial, program, N, C, S, tiles, splits, divisor,
            SHORT, ROWS, POSITIONS, AXIS,
        )  # fmt: skip


@triton.jit
def _lerp(pointer, end, weight, mask):
    """Move what is stored toward ``end``, as ``Tensor.lerp_`` does: exactly there for weight 1."""
    start = tl.load(pointer, mask=mask, other=0).to(tl.float32)
    far = end + (start - end) * (1 - weight)
    value = tl.where(weight + tl.zeros_like(end) < 0.5, start + weight * (end - start), far)
    tl.store(pointer, value, mask=mask)


@triton.jit
def _store_channels(
    saved, running_mean, running_var, momentum, unbias, c, mean, var, exists, N, C, G,
    HAS_ROWS: tl.constexpr, TRACKS: tl.constexpr, MOMENTUM_TENSOR: tl.constexpr,
):  # fmt: skip
    """Keep BN statistics for the backward pass, and move the running statistics toward them."""
    _, channels, _, _ = saved_sections(saved, N, C, G, HAS_ROWS)
    tl.store(channels + c, mean, mask=exists)
    tl.store(channels + C + c, var, mask=exists)
    if TRACKS:
        new = tl.load(momentum).to(tl.float32) if MOMENTUM_TENSOR else momentum
        _lerp(running_mean + c, mean, new, exists)
        _lerp(running_var + c, var * unbias, new, exists)


@triton.jit(do_not_specialize=SHAPES)
def ssn_fwd_pool_kernel(
    saved, partial, running_mean, running_var, momentum, unbias,
    N, C, S, G, tiles, splits, divisor, samples,
    LN: tl.constexpr, GN: tl.constexpr, TRACKS: tl.constexpr, MOMENTUM_TENSOR: tl.constexpr,
    SPLITS: tl.constexpr, LN_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program per sample and per block of channels, where the affine pass does not pool."""
    N = widened(N, WIDE)
    chunk = tiles.to(N.dtype) * POSITIONS
    rows, _, of_samples, of_groups = saved_sections(saved, N, C, G, True)
    program = tl.program_id(0)
    if program < samples:
        n = program.to(N.dtype)
        if LN:
            mean_ln, var_ln = sample_moments(
                rows, partial, n, N, C, S, chunk, splits, divisor, SPLITS, LN_CHANNELS
            )
            one = tl.arange(0, 1)
            tl.store(of_samples + n + one, mean_ln)
            tl.store(of_samples + N + n + one, var_ln)
        if GN:
            for first in range(0, G, GROUPS):
                g = first + tl.arange(0, GROUPS)
                mean_gn, var_gn = group_moments(
                    rows, partial, n, g, N, C, G, S, chunk, splits, divisor,
                    SPLITS, GROUPS, GROUP_CHANNELS,
                )  # fmt: skip
                tl.store(of_groups + n * G + g, mean_gn, mask=g < G)
                tl.store(of_groups + N * G + n * G + g, var_gn, mask=g < G)
    else:
        c = (program - samples) * CHANNELS + tl.arange(0, CHANNELS)
        mean_bn, var_bn = channel_moments(
            rows, partial, c, c < C, N, C, S, chunk, splits, divisor, SPLITS, SAMPLES, CHANNELS
        )
        _store_channels(
            saved, running_mean, running_var, momentum, unbias, c, mean_bn, var_bn, c < C, N, C, G,
            True, TRACKS, MOMENTUM_TENSOR,
        )  # fmt: skip


@triton.jit
def _row_affine(
    saved, partial, weight, bias, running_mean, running_var, momentum,
    row, n, c, exists, sample, split, N, C, S, G, chunk, splits, divisor, eps, unbias,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr,
    LN: tl.constexpr, BATCH: tl.constexpr, CONSTANT: tl.constexpr, HAS_ROWS: tl.constexpr,
    MERGES: tl.constexpr, TRACKS: tl.constexpr, MOMENTUM_TENSOR: tl.constexpr,
    SPLITS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Centre, gain and shift of ``y = (x - centre) * gain + shift``.

    The first program of a row, sample or channel keeps what it found of it for the backward pass.
    """
    rows, _, of_samples, _ = saved_sections(saved, N, C, G, HAS_ROWS)
    mean_in = tl.zeros((ROWS,), tl.float32)
    var_in = tl.zeros((ROWS,), tl.float32)
    if HAS_ROWS:
        one_mean, one_var = load_moments(
            rows, partial, tl.expand_dims(row, 0), tl.expand_dims(exists, 0),
            N, C, S, chunk, splits, divisor, SPLITS,
        )  # fmt: skip
        mean_in = tl.sum(one_mean, 0)
        var_in = tl.sum(one_var, 0)
        if SPLITS > 1:
            keeps = exists & (tl.zeros_like(n) + split == 0)
            tl.store(rows + row, mean_in, mask=keeps)
            tl.store(rows + N * C + row, var_in, mask=keeps)
    if LN and MERGES:
        mean_ln, var_ln = sample_moments(
            rows, partial, sample, N, C, S, chunk, splits, divisor, SPLITS, CHANNELS
        )
        one = tl.arange(0, 1)
        is_first = one + tl.min(c, 0) + split == 0  # the first channel and the first split
        tl.store(of_samples + sample + one, mean_ln, mask=is_first)
        tl.store(of_samples + N + sample + one, var_ln, mask=is_first)
    else:
        mean_ln, var_ln = load_saved(1, KINDS, saved, row, n, c, exists, N, C, G, HAS_ROWS)
    first = exists & (n + split == 0)
    if CONSTANT:
        mean_bn = tl.load(running_mean + c, mask=exists, other=0).to(tl.float32)
        var_bn = tl.load(running_var + c, mask=exists, other=0).to(tl.float32)
        _store_channels(
            saved, None, None, momentum, unbias, c, mean_bn, var_bn, first, N, C, G,
            HAS_ROWS, False, False,
        )  # fmt: skip
    elif BATCH and MERGES:
        mean_bn, var_bn = channel_moments(
            rows, partial, c, exists, N, C, S, chunk, splits, divisor, SPLITS, SAMPLES, ROWS
        )
        if sample + split == 0:
            _store_channels(
                saved, running_mean, running_var, momentum, unbias, c, mean_bn, var_bn, first,
                N, C, G, HAS_ROWS, TRACKS, MOMENTUM_TENSOR,
            )  # fmt: skip
    else:
        mean_bn, var_bn = load_saved(2, KINDS, saved, row, n, c, exists, N, C, G, HAS_ROWS)
    mean_gn, var_gn = load_saved(3, KINDS, saved, row, n, c, exists, N, C, G, HAS_ROWS)

    mean = mix(saved, mean_in, mean_ln, mean_bn, mean_gn, KINDS, MEAN)
    var = mix(saved + 16, var_in, var_ln, var_bn, var_gn, KINDS, VAR)
    _, gain = load_gain(var, weight, c, exists, eps)
    # x meets its own row's mean first: distances from it cost no digits however large it is.
    centre = mean_in if HAS_ROWS else mean
    shift = gain * (centre - mean)
    if bias is not None:
        shift += tl.load(bias + c, mask=exists, other=0).to(tl.float32)
    return centre, gain, shift


@triton.jit
def _whole_rows(
    x, y, saved, weight, bias, program, N, C, S, divisor, eps,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    row, _n, c, exists, _sample, origin, offset = row_block(program, N, C, S, ROWS, AXIS)
    lanes, offsets = tile_offsets(offset, C, POSITIONS, AXIS)
    inside = tl.expand_dims(exists, AXIS) & (lanes < S)
    value, mean, m2 = _load_rows(x + origin + offsets, inside, S, AXIS)
    var = m2 / divisor
    tl.store(saved + 32 + row, mean, mask=exists)
    tl.store(saved + 32 + N * C + row, var, mask=exists)
    _, gain = load_gain(var, weight, c, exists, eps)
    result = (value - tl.expand_dims(mean, AXIS)) * tl.expand_dims(gain, AXIS)
    if bias is not None:
        shift = tl.load(bias + c, mask=exists, other=0).to(tl.float32)
        result += tl.expand_dims(shift, AXIS)
    tl.store(y + origin + offsets, result, mask=inside)


@triton.jit(do_not_specialize=SHAPES)
def ssn_fwd_apply_kernel(
    x, y, saved, partial, scratch, weight, bias, running_mean, running_var, momentum,
    N, C, S, G, tiles, splits, divisor, eps, unbias,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr,
    LN: tl.constexpr, BATCH: tl.constexpr, CONSTANT: tl.constexpr, HAS_ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    MERGES: tl.constexpr, TRACKS: tl.constexpr, MOMENTUM_TENSOR: tl.constexpr,
    SPLITS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
    SHORT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``y = (x - centre) * gain + shift``; with MERGES it pools what its rows need itself."""
    N = widened(N, WIDE)
    C, S = align_shape(C, S, AXIS, ALIGN)
    # From the end: what the moments pass read last is the likeliest to be in the cache still.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    if WHOLE:
        _whole_rows(
            x, y, saved, weight, bias, program, N, C, S, divisor, eps, ROWS, POSITIONS, AXIS
        )
    else:
        split = program % splits
        row, n, c, exists, sample, origin, offset = row_block(
            program // splits, N, C, S, ROWS, AXIS
        )
        centre, gain, shift = _row_affine(
            saved, partial, weight, bias, running_mean, running_var, momentum,
            row, n, c, exists, sample, split, N, C, S, G, tiles.to(N.dtype) * POSITIONS, splits,
            divisor, eps, unbias, KINDS, MEAN, VAR, LN, BATCH, CONSTANT, HAS_ROWS,
            MERGES, TRACKS, MOMENTUM_TENSOR, SPLITS, SAMPLES, CHANNELS, ROWS,
        )  # fmt: skip
        if scratch is not None:
            centre, gain, shift = hand_over(scratch, centre, gain, shift, row, exists, N * C)
        first, last = position_range(split, N, S, tiles, SHORT, POSITIONS)
        lanes, offsets = tile_offsets(offset, C, POSITIONS, AXIS)
        there = tl.expand_dims(exists, AXIS)
        centre = tl.expand_dims(centre, AXIS)
        gain = tl.expand_dims(gain, AXIS)
        shift = tl.expand_dims(shift, AXIS)
        for position in range(first, last, POSITIONS):
            inside = there & (lanes < S - position)
            at = tile_start(origin, position, C, AXIS)
            value = tl.load(x + at + offsets, mask=inside, other=0).to(tl.float32)
            tl.store(y + at + offsets, (value - centre) * gain + shift, mask=inside)
