"""Backward: row sums with what follows from them, pooling, the gradients of x and of the ratios."""

import triton
import triton.language as tl

from ssn_plugin.ops.switchable_norm.triton.kernels.candidates import (
    load_gain,
    load_pair,
    load_saved,
    mix,
    of_kind,
    pooled_sections,
)
from ssn_plugin.ops.switchable_norm.triton.kernels.pooling import (
    channel_sums,
    group_gradients,
    load_sums,
    sample_gradients,
)
from ssn_plugin.ops.switchable_norm.triton.kernels.ratios import (
    sum_partials,
    write_control_gradient,
)
from ssn_plugin.ops.switchable_norm.triton.kernels.tiles import (
    SHAPES,
    align_shape,
    hand_over,
    position_range,
    row_block,
    tile_offsets,
    tile_start,
    widened,
    zero_tile,
)


@triton.jit
def behind_sums(sums, size, splits, SPREAD: tl.constexpr):
    """The partial sums of the ratios' gradients: behind four numbers per row and split.

    With SPREAD three numbers per row are between them, of `hand_over`.
    """
    if SPREAD:
        return sums + (4 * splits + 3) * size
    else:
        return sums + 4 * splits * size


@triton.jit(do_not_specialize=SHAPES)
def ssn_bwd_sums_kernel(
    dy, x, saved, sums, weight, eps, N, C, S, G, tiles, splits,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, HAS_ROWS: tl.constexpr,
    RATIOS: tl.constexpr, RAW: tl.constexpr, SPREAD: tl.constexpr,
    SHORT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Per split of a row the gradients of mixed mean and variance, sum dy, sum dy * normalised x.

    All four are linear in sums over positions, so splits and rows need only be added up.
    """
    N = widened(N, WIDE)
    C, S = align_shape(C, S, AXIS, ALIGN)
    program = tl.program_id(0)
    split = program % splits
    row, n, c, exists, _sample, origin, offset = row_block(program // splits, N, C, S, ROWS, AXIS)
    first, last = position_range(split, N, S, tiles, SHORT, POSITIONS)
    lanes, offsets = tile_offsets(offset, C, POSITIONS, AXIS)
    there = tl.expand_dims(exists, AXIS)
    mean_in, var_in = load_saved(0, KINDS, saved, row, n, c, exists, N, C, G, HAS_ROWS)
    mean_bn, var_bn = load_saved(2, KINDS, saved, row, n, c, exists, N, C, G, HAS_ROWS)
    centre = mean_bn  # BN's constant is all there is
    if HAS_ROWS:
        centre = tl.load(saved + 32 + row, mask=exists, other=0)
    origin_of_x = tl.expand_dims(centre, AXIS)
    total = zero_tile(ROWS, POSITIONS, AXIS)
    product = zero_tile(ROWS, POSITIONS, AXIS)
    for position in range(first, last, POSITIONS):
        inside = there & (lanes < S - position)
        at = tile_start(origin, position, C, AXIS)
        gradient = tl.load(dy + at + offsets, mask=inside, other=0).to(tl.float32)
        value = tl.load(x + at + offsets, mask=inside, other=0).to(tl.float32)
        total += gradient
        product += gradient * (value - origin_of_x)
    total = tl.sum(total, AXIS)
    product = tl.sum(product, AXIS)
    size = N * C
    out = sums + split * size + row
    if SPREAD:
        # To a row per thread, the other way than in hand_over.
        tl.store(out, total, mask=exists)
        tl.store(out + splits * size, product, mask=exists)
        tl.debug_barrier()
        total = tl.load(out, mask=exists, other=0)
        product = tl.load(out + splits * size, mask=exists, other=0)
        tl.debug_barrier()  # what was read is written over below

    mean_ln, var_ln = load_saved(1, KINDS, saved, row, n, c, exists, N, C, G, HAS_ROWS)
    mean_gn, var_gn = load_saved(3, KINDS, saved, row, n, c, exists, N, C, G, HAS_ROWS)
    mean = mix(saved, mean_in, mean_ln, mean_bn, mean_gn, KINDS, MEAN)
    var = mix(saved + 16, var_in, var_ln, var_bn, var_gn, KINDS, VAR)
    inverse_std, gain = load_gain(var, weight, c, exists, eps)
    product = (product + (centre - mean) * total) * inverse_std
    dmean = -gain * total
    dvar = -0.5 * gain * inverse_std * product
    tl.store(out, dmean, mask=exists)
    tl.store(out + splits * size, dvar, mask=exists)
    tl.store(out + 2 * splits * size, total, mask=exists)
    tl.store(out + 3 * splits * size, product, mask=exists)
    if RATIOS:
        out_of_rows = behind_sums(sums, size, splits, SPREAD)
        places = tl.arange(0, 8)
        found = tl.zeros((8,), tl.float32)
        for k in tl.static_range(4):
            if (KINDS >> (4 * k)) & 15 < 4:
                mean_k = of_kind((KINDS >> (4 * k)) & 15, mean_in, mean_ln, mean_bn, mean_gn)
                var_k = of_kind((KINDS >> (4 * k)) & 15, var_in, var_ln, var_bn, var_gn)
                if not RAW:
                    # SparsestMax and softmax ignore what all candidates share; it costs digits.
                    mean_k -= mean
                    var_k -= var
                dmean_k = tl.sum(tl.where(exists, dmean * mean_k, 0.0), 0)
                dvar_k = tl.sum(tl.where(exists, dvar * var_k, 0.0), 0)
                found += tl.where(places == k, dmean_k, 0.0)
                found += tl.where(places == 4 + k, dvar_k, 0.0)
        tl.store(out_of_rows + program.to(N.dtype) * 8 + places, found)


@triton.jit(do_not_specialize=SHAPES)
def ssn_bwd_pool_kernel(
    sums, pooled, dweight, dbias, N, C, G, splits, samples, blocks, count,
    LN: tl.constexpr, GN: tl.constexpr, BATCH: tl.constexpr,
    RATIOS: tl.constexpr, SPREAD: tl.constexpr,
    SPLITS: tl.constexpr, LN_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program per sample, per block of channels, and per chunk of the ratios' partial sums."""
    N = widened(N, WIDE)
    of_channels, of_samples, of_groups = pooled_sections(pooled, N, C, G)
    program = tl.program_id(0)
    if program < samples:
        n = program.to(N.dtype)
        if LN:
            dmean_ln, dvar_ln = sample_gradients(sums, n, N, C, splits, SPLITS, LN_CHANNELS)
            one = tl.arange(0, 1)
            tl.store(of_samples + n + one, dmean_ln)
            tl.store(of_samples + N + n + one, dvar_ln)
        if GN:
            for first in range(0, G, GROUPS):
                g = first + tl.arange(0, GROUPS)
                dmean_gn, dvar_gn = group_gradients(
                    sums, n, g, N, C, G, splits, SPLITS, GROUPS, GROUP_CHANNELS
                )
                tl.store(of_groups + n * G + g, dmean_gn, mask=g < G)
                tl.store(of_groups + N * G + n * G + g, dvar_gn, mask=g < G)
    elif program < samples + blocks:
        c = (program - samples) * CHANNELS + tl.arange(0, CHANNELS)
        if BATCH:
            dmean_bn = channel_sums(sums, 0, c, c < C, N, C, splits, SPLITS, SAMPLES, CHANNELS)
            dvar_bn = channel_sums(sums, 1, c, c < C, N, C, splits, SPLITS, SAMPLES, CHANNELS)
            tl.store(of_channels + c, dmean_bn / N, mask=c < C)
            tl.store(of_channels + C + c, dvar_bn / N, mask=c < C)
        _affine_gradients(sums, dweight, dbias, c, c < C, N, C, splits, SPLITS, SAMPLES, CHANNELS)
    elif RATIOS:
        chunk = program - samples - blocks
        partials = behind_sums(sums, N * C, splits, SPREAD)
        found = sum_partials(partials, chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, count))
        tl.store(of_groups + 2 * N * G + chunk * 8 + tl.arange(0, 8), found)


@triton.jit
def _affine_gradients(
    sums, dweight, dbias, c, exists, N, C, splits,
    SPLITS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias, those that are wanted."""
    if dbias is not None:
        total = channel_sums(sums, 2, c, exists, N, C, splits, SPLITS, SAMPLES, CHANNELS)
        tl.store(dbias + c, total, mask=exists)
    if dweight is not None:
        product = channel_sums(sums, 3, c, exists, N, C, splits, SPLITS, SAMPLES, CHANNELS)
        tl.store(dweight + c, product, mask=exists)


@triton.jit
def _affine_gradients_of_first(
    sums, dweight, dbias, c, exists, n, sample, split, N, C, splits,
    SPLITS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The same by the first program that has the channels in its rows."""
    if sample + split == 0:
        _affine_gradients(
            sums, dweight, dbias, c, exists & (n == 0), N, C, splits, SPLITS, SAMPLES, CHANNELS
        )


@triton.jit
def _row_affine(
    sums, saved, pooled, weight, dweight, dbias,
    row, n, c, exists, sample, split, N, C, S, G, splits, divisor, eps,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr,
    LN: tl.constexpr, GN: tl.constexpr, BATCH: tl.constexpr, MERGES: tl.constexpr,
    SPLITS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gain, slope and offset of ``dx = gain * dy + slope * (x - mean_in) + offset``."""
    mean_in, var_in = load_pair(
        0, saved + 32, saved, saved, saved, row, n, c, exists, N, C, G
    )  # fmt: skip
    mean_ln, var_ln = load_saved(1, KINDS, saved, row, n, c, exists, N, C, G, True)
    mean_bn, var_bn = load_saved(2, KINDS, saved, row, n, c, exists, N, C, G, True)
    mean_gn, var_gn = load_saved(3, KINDS, saved, row, n, c, exists, N, C, G, True)
    var = mix(saved + 16, var_in, var_ln, var_bn, var_gn, KINDS, VAR)
    _, gain = load_gain(var, weight, c, exists, eps)

    here, these = tl.expand_dims(row, 0), tl.expand_dims(exists, 0)
    dmean = tl.sum(load_sums(sums, 0, here, these, N, C, splits, SPLITS), 0)
    dvar = tl.sum(load_sums(sums, 1, here, these, N, C, splits, SPLITS), 0)
    nothing = tl.zeros((ROWS,), tl.float32)
    dmean_ln, dvar_ln = nothing, nothing
    dmean_bn, dvar_bn = nothing, nothing
    dmean_gn, dvar_gn = nothing, nothing
    if LN and MERGES:
        dmean_ln, dvar_ln = sample_gradients(sums, sample, N, C, splits, SPLITS, CHANNELS)
    if BATCH and MERGES:
        dmean_bn = channel_sums(sums, 0, c, exists, N, C, splits, SPLITS, SAMPLES, ROWS) / N
        dvar_bn = channel_sums(sums, 1, c, exists, N, C, splits, SPLITS, SAMPLES, ROWS) / N
    if not MERGES:
        if LN or GN or BATCH:
            channels, samples, groups = pooled_sections(pooled, N, C, G)
        if LN:
            dmean_ln, dvar_ln = load_pair(
                1, pooled, channels, samples, groups, row, n, c, exists, N, C, G
            )
        if BATCH:
            dmean_bn, dvar_bn = load_pair(
                2, pooled, channels, samples, groups, row, n, c, exists, N, C, G
            )
        if GN:
            dmean_gn, dvar_gn = load_pair(
                3, pooled, channels, samples, groups, row, n, c, exists, N, C, G
            )
    through_distance = mix(
        saved + 16, nothing, dvar_ln * (mean_in - mean_ln), dvar_bn * (mean_in - mean_bn),
        dvar_gn * (mean_in - mean_gn), KINDS, VAR,
    )  # fmt: skip
    dmean_in = mix(saved, dmean, dmean_ln, dmean_bn, dmean_gn, KINDS, MEAN) + 2 * through_distance
    dvar_in = mix(saved + 16, dvar, dvar_ln, dvar_bn, dvar_gn, KINDS, VAR)
    if MERGES:
        _affine_gradients_of_first(
            sums, dweight, dbias, c, exists, n, sample, split, N, C, splits, SPLITS, SAMPLES, ROWS
        )
    return mean_in, gain, 2 * dvar_in / divisor, dmean_in / S


@triton.jit
def _input_gradient(
    dy, x, dx, sums, saved, pooled, weight, dweight, dbias, program,
    N, C, S, G, tiles, splits, divisor, eps,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr,
    LN: tl.constexpr, GN: tl.constexpr, BATCH: tl.constexpr, HAS_ROWS: tl.constexpr,
    SPREAD: tl.constexpr, MERGES: tl.constexpr,
    SPLITS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, SHORT: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    split = program % splits
    row, n, c, exists, sample, origin, offset = row_block(program // splits, N, C, S, ROWS, AXIS)
    first, last = position_range(split, N, S, tiles, SHORT, POSITIONS)
    lanes, offsets = tile_offsets(offset, C, POSITIONS, AXIS)
    there = tl.expand_dims(exists, AXIS)
    if HAS_ROWS:
        mean_in, gain, slope, shift = _row_affine(
            sums, saved, pooled, weight, dweight, dbias,
            row, n, c, exists, sample, split, N, C, S, G, splits, divisor, eps,
            KINDS, MEAN, VAR, LN, GN, BATCH, MERGES, SPLITS, SAMPLES, CHANNELS, ROWS,
        )  # fmt: skip
        if SPREAD:
            scratch = sums + 4 * splits * N * C
            gain, slope, shift = hand_over(scratch, gain, slope, shift, row, exists, N * C)
            mean_in = tl.load(saved + 32 + row, mask=exists, other=0)
        mean_in = tl.expand_dims(mean_in, AXIS)
        gain = tl.expand_dims(gain, AXIS)
        slope = tl.expand_dims(slope, AXIS)
        shift = tl.expand_dims(shift, AXIS)
        for position in range(first, last, POSITIONS):
            inside = there & (lanes < S - position)
            at = tile_start(origin, position, C, AXIS)
            gradient = tl.load(dy + at + offsets, mask=inside, other=0).to(tl.float32)
            value = tl.load(x + at + offsets, mask=inside, other=0).to(tl.float32)
            result = gain * gradient + (slope * (value - mean_in) + shift)
            tl.store(dx + at + offsets, result, mask=inside)
    else:
        # BN's constants alone: y is a gain times x, and a shift.
        _, var = load_saved(2, KINDS, saved, row, n, c, exists, N, C, G, False)
        _, gain = load_gain(var, weight, c, exists, eps)
        if MERGES:
            _affine_gradients_of_first(
                sums, dweight, dbias, c, exists, n, sample, split, N, C, splits,
                SPLITS, SAMPLES, ROWS,
            )  # fmt: skip
        gain = tl.expand_dims(gain, AXIS)
        for position in range(first, last, POSITIONS):
            inside = there & (lanes < S - position)
            at = tile_start(origin, position, C, AXIS)
            gradient = tl.load(dy + at + offsets, mask=inside, other=0).to(tl.float32)
            tl.store(dx + at + offsets, gain * gradient, mask=inside)


@triton.jit
def _whole_rows(
    dy, x, dx, sums, saved, weight, program, N, C, S, divisor, eps,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """A layer decided on IN, of rows that are one tile: dy and x are read once."""
    row, _n, c, exists, _sample, origin, offset = row_block(program, N, C, S, ROWS, AXIS)
    lanes, offsets = tile_offsets(offset, C, POSITIONS, AXIS)
    inside = tl.expand_dims(exists, AXIS) & (lanes < S)
    size = N * C
    mean = tl.load(saved + 32 + row, mask=exists, other=0)
    var = tl.load(saved + 32 + size + row, mask=exists, other=0)
    inverse_std, gain = load_gain(var, weight, c, exists, eps)
    gradient = tl.load(dy + origin + offsets, mask=inside, other=0).to(tl.float32)
    value = tl.load(x + origin + offsets, mask=inside, other=0).to(tl.float32)
    distance = value - tl.expand_dims(mean, AXIS)
    total = tl.sum(gradient, AXIS)
    product = tl.sum(gradient * distance, AXIS) * inverse_std
    if sums is not None:
        tl.store(sums + 2 * size + row, total, mask=exists)
        tl.store(sums + 3 * size + row, product, mask=exists)
    slope = tl.expand_dims(product * inverse_std / divisor, AXIS)
    result = gradient - slope * distance - tl.expand_dims(total / S, AXIS)
    tl.store(dx + origin + offsets, tl.expand_dims(gain, AXIS) * result, mask=inside)


@triton.jit(do_not_specialize=SHAPES)
def ssn_bwd_dx_kernel(
    dy, x, dx, sums, saved, pooled, weight, dweight, dbias, dmean_control, dvar_control,
    N, C, S, G, tiles, splits, divisor, count, eps,
    K: tl.constexpr, KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr,
    MAP: tl.constexpr, LN: tl.constexpr, GN: tl.constexpr, BATCH: tl.constexpr,
    HAS_ROWS: tl.constexpr, WHOLE: tl.constexpr,
    RATIOS: tl.constexpr, SPREAD: tl.constexpr, MERGES: tl.constexpr,
    SPLITS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
    SHORT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``dx = gain * dy + slope * (x - mean_in) + offset``; one more program does the ratios."""
    N = widened(N, WIDE)
    C, S = align_shape(C, S, AXIS, ALIGN)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    if WHOLE:
        _whole_rows(
            dy, x, dx, sums, saved, weight, program, N, C, S, divisor, eps, ROWS, POSITIONS, AXIS
        )
    elif RATIOS and program == tl.num_programs(0) - 1:
        # It is started first: no launch of its own for eight numbers.
        if MERGES:
            found = sum_partials(behind_sums(sums, N * C, splits, SPREAD), 0, count)
        else:
            _, _, of_groups = pooled_sections(pooled, N, C, G)
            found = sum_partials(of_groups + 2 * N * G, 0, count)
        write_control_gradient(dmean_control, found, 0, saved, K, MAP, MEAN)
        write_control_gradient(dvar_control, found, 4, saved + 16, K, MAP, VAR)
    elif dx is not None:
        _input_gradient(
            dy, x, dx, sums, saved, pooled, weight, dweight, dbias, program,
            N, C, S, G, tiles, splits, divisor, eps,
            KINDS, MEAN, VAR, LN, GN, BATCH, HAS_ROWS, SPREAD, MERGES, SPLITS, SAMPLES, CHANNELS,
            SHORT, ROWS, POSITIONS, AXIS,
        )  # fmt: skip
