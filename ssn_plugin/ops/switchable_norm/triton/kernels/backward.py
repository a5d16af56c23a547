"""Backward: row sums, pooling, the input's and the control parameters' gradients."""

import triton
import triton.language as tl

from ssn_plugin.ops.switchable_norm.triton.kernels.candidates import (
    load_candidate,
    load_gain,
    load_pair,
    load_ratio,
    mix,
    pooled_sections,
)
from ssn_plugin.ops.switchable_norm.triton.kernels.ratios import write_control_gradient
from ssn_plugin.ops.switchable_norm.triton.kernels.tiles import (
    SHAPES,
    align_shape,
    position_range,
    row_block,
    tile_offsets,
    tile_start,
    zero_tile,
)


@triton.jit(do_not_specialize=SHAPES)
def ssn_bwd_sums_kernel(
    dy, x, saved, out, N, C, S, tiles, splits,
    HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Sums of dy and of dy * (x - mean_in) over ``tiles`` tiles of positions of every row."""
    size = N.to(tl.int64) * C
    C, S = align_shape(C, S, AXIS, ALIGN)
    split = tl.program_id(0) % splits
    row, _n, c, exists, origin, offset = row_block(
        tl.program_id(0) // splits, N.to(tl.int64), C, S, ROWS, AXIS
    )
    first, last = position_range(split, S, tiles, POSITIONS)
    lanes, offsets = tile_offsets(offset, C, POSITIONS, AXIS)
    there = tl.expand_dims(exists, AXIS)
    # Without row moments BN's constant mean is all there is: its section comes first then.
    if HAS_ROWS:
        centre = tl.load(saved + 32 + row, mask=exists, other=0)
    else:
        centre = tl.load(saved + 32 + c, mask=exists, other=0)
    centre = tl.expand_dims(centre, AXIS)
    total = zero_tile(ROWS, POSITIONS, AXIS)
    product = zero_tile(ROWS, POSITIONS, AXIS)
    for position in range(first, last, POSITIONS):
        inside = there & (lanes < S - position)
        at = tile_start(origin, position, C, AXIS)
        gradient = tl.load(dy + at + offsets, mask=inside, other=0).to(tl.float32)
        value = tl.load(x + at + offsets, mask=inside, other=0).to(tl.float32)
        total += gradient
        product += gradient * (value - centre)
    tl.store(out + split * size + row, tl.sum(total, AXIS), mask=exists)
    tl.store(out + (splits + split) * size + row, tl.sum(product, AXIS), mask=exists)


@triton.jit(do_not_specialize=SHAPES)
def ssn_bwd_merge_kernel(partial, out, N, C, splits, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Sums of whole rows from those of their splits."""
    size = N.to(tl.int64) * C
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < size
    total = tl.zeros((SPLITS, ROWS), tl.float32)
    product = tl.zeros((SPLITS, ROWS), tl.float32)
    for first in range(0, splits, SPLITS):
        split = tl.expand_dims(first + tl.arange(0, SPLITS), 1)
        inside = (split < splits) & tl.expand_dims(exists, 0)
        at = split * size + tl.expand_dims(row, 0)
        total += tl.load(partial + at, mask=inside, other=0)
        product += tl.load(partial + splits * size + at, mask=inside, other=0)
    tl.store(out + row, tl.sum(total, 0), mask=exists)
    tl.store(out + size + row, tl.sum(product, 0), mask=exists)


@triton.jit
def _row_gradients(
    sums, saved, weight, eps, row, n, c, inside, N, C, G,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Per row: sum of dy, that of dy * (x - m) / std, gain, m, v and their gradients."""
    mean, var = mix(saved, None, None, row, n, c, inside, N, C, G, KINDS, MEAN, VAR, HAS_ROWS)
    inverse_std, gain = load_gain(var, weight, c, inside, eps)
    total = tl.load(sums + row, mask=inside, other=0)
    product = tl.load(sums + N * C + row, mask=inside, other=0)
    if HAS_ROWS:
        product += (tl.load(saved + 32 + row, mask=inside, other=0) - mean) * total
    dmean = -gain * total
    dvar = -0.5 * gain * inverse_std * inverse_std * product
    return total, product * inverse_std, gain, mean, var, dmean, dvar


@triton.jit
def _sum_all(values):
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def _add_ratio_gradients(
    partial, k: tl.constexpr, KIND: tl.constexpr, saved, row, n, c, inside, N, C, G,
    mean, var, dmean, dvar, RAW: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    if KIND < 4:
        lanes = tl.arange(0, 8)
        mean_k, var_k = load_candidate(
            KIND, saved, None, None, row, n, c, inside, N, C, G, HAS_ROWS
        )
        if not RAW:
            # SparsestMax and softmax ignore what all candidates share; here it would cost digits.
            mean_k -= mean
            var_k -= var
        partial += tl.where(lanes == k, _sum_all(dmean * mean_k), 0.0)
        partial += tl.where(lanes == 4 + k, _sum_all(dvar * var_k), 0.0)
    return partial


@triton.jit
def _pool_sample(
    sums, saved, pooled, weight, eps, n, N, C, G,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, HAS_ROWS: tl.constexpr,
    LN: tl.constexpr, GN: tl.constexpr, RATIOS: tl.constexpr, RAW: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Means over one sample of the gradients of m and v, and its part of the ratios' gradients."""
    _, samples, groups, partials = pooled_sections(pooled, N, C, G)
    count = 1
    if GN:
        count = G
    size = C // count
    group_lanes = tl.arange(0, GROUPS)
    channel_lanes = tl.expand_dims(tl.arange(0, CHANNELS), 0)
    all_dmean = tl.zeros((GROUPS,), tl.float32)
    all_dvar = tl.zeros((GROUPS,), tl.float32)
    partial = tl.zeros((8,), tl.float32)
    for first in range(0, count, GROUPS):
        g = first + group_lanes
        exists = g < count
        group_dmean = tl.zeros((GROUPS, CHANNELS), tl.float32)
        group_dvar = tl.zeros((GROUPS, CHANNELS), tl.float32)
        for start in range(0, size, CHANNELS):
            member = start + channel_lanes
            inside = tl.expand_dims(exists, 1) & (member < size)
            c = tl.expand_dims(g * size, 1) + member
            row = n * C + c
            sample = n + tl.zeros((GROUPS, CHANNELS), tl.int64)
            _total, _product, _scale, mean, var, dmean, dvar = _row_gradients(
                sums, saved, weight, eps, row, sample, c, inside, N, C, G,
                KINDS, MEAN, VAR, HAS_ROWS,
            )  # fmt: skip
            group_dmean += dmean
            group_dvar += dvar
            if RATIOS:
                for k in tl.static_range(4):
                    partial = _add_ratio_gradients(
                        partial, k, (KINDS >> (4 * k)) & 15, saved, row, sample, c, inside,
                        N, C, G, mean, var, dmean, dvar, RAW, HAS_ROWS,
                    )  # fmt: skip
        one_dmean = tl.sum(group_dmean, 1)
        one_dvar = tl.sum(group_dvar, 1)
        if GN:
            tl.store(groups + n * G + g, one_dmean / size, mask=exists)
            tl.store(groups + N * G + n * G + g, one_dvar / size, mask=exists)
        all_dmean += one_dmean
        all_dvar += one_dvar
    if LN:
        tl.store(samples + n, tl.sum(all_dmean, 0) / C)
        tl.store(samples + N + n, tl.sum(all_dvar, 0) / C)
    if RATIOS:
        tl.store(partials + n * 8 + tl.arange(0, 8), partial)


@triton.jit
def _pool_channels(
    sums, saved, pooled, weight, eps, dweight, dbias, block, N, C, G,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, HAS_ROWS: tl.constexpr,
    BATCH: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Means over the batch of the gradients of m and v; weight and bias gradients."""
    channels = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < C
    lanes = tl.expand_dims(tl.arange(0, SAMPLES), 1)
    c = tl.expand_dims(channels, 0) + tl.zeros((SAMPLES, CHANNELS), tl.int32)
    all_dmean = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    all_dvar = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    all_total = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    all_product = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    for first in range(0, N, SAMPLES):
        n = (first + lanes).to(tl.int64) + tl.zeros((SAMPLES, CHANNELS), tl.int64)
        inside = (n < N) & tl.expand_dims(exists, 0)
        total, product, _scale, _mean, _var, dmean, dvar = _row_gradients(
            sums, saved, weight, eps, n * C + c, n, c, inside, N, C, G, KINDS, MEAN, VAR, HAS_ROWS
        )
        all_dmean += dmean
        all_dvar += dvar
        all_total += total
        all_product += product
    if BATCH:
        count = N.to(tl.float32)
        tl.store(pooled + channels, tl.sum(all_dmean, 0) / count, mask=exists)
        tl.store(pooled + C + channels, tl.sum(all_dvar, 0) / count, mask=exists)
    if dweight is not None:
        tl.store(dweight + channels, tl.sum(all_product, 0), mask=exists)
    if dbias is not None:
        tl.store(dbias + channels, tl.sum(all_total, 0), mask=exists)


@triton.jit(do_not_specialize=SHAPES)
def ssn_bwd_pool_kernel(
    sums, saved, pooled, weight, dweight, dbias, eps, N, C, G, samples,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, HAS_ROWS: tl.constexpr,
    LN: tl.constexpr, GN: tl.constexpr, BATCH: tl.constexpr,
    RATIOS: tl.constexpr, RAW: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program per sample and per block of channels."""
    N = N.to(tl.int64)
    program = tl.program_id(0)
    if program < samples:
        if LN or (GN or RATIOS):
            _pool_sample(
                sums, saved, pooled, weight, eps, program.to(tl.int64), N, C, G,
                KINDS, MEAN, VAR, HAS_ROWS, LN, GN, RATIOS, RAW, GROUPS, GROUP_CHANNELS,
            )  # fmt: skip
    else:
        _pool_channels(
            sums, saved, pooled, weight, eps, dweight, dbias, program - samples, N, C, G,
            KINDS, MEAN, VAR, HAS_ROWS, BATCH, SAMPLES, CHANNELS,
        )  # fmt: skip


@triton.jit
def _add_adjoint(
    dmean_in, dvar_in, k: tl.constexpr, KIND: tl.constexpr, saved, pooled,
    row, n, c, inside, N, C, G, mean_in, dmean, dvar,
    MEAN: tl.constexpr, VAR: tl.constexpr, RUNNING: tl.constexpr,
):  # fmt: skip
    """What one candidate hands to the gradients of the row moments."""
    if KIND < 4 and not (KIND == 2 and RUNNING):
        p = load_ratio(saved, k, MEAN)
        q = load_ratio(saved + 16, k, VAR)
        if KIND == 0:
            dmean_in += p * dmean
            dvar_in += q * dvar
        else:
            channels, samples, groups, _ = pooled_sections(pooled, N, C, G)
            pooled_dmean, pooled_dvar = load_pair(
                KIND, pooled, channels, samples, groups, row, n, c, inside, N, C, G
            )
            mean_k, _ = load_candidate(KIND, saved, None, None, row, n, c, inside, N, C, G, True)
            dmean_in += p * pooled_dmean + 2 * q * pooled_dvar * (mean_in - mean_k)
            dvar_in += q * pooled_dvar
    return dmean_in, dvar_in


@triton.jit
def _row_affine(
    sums, saved, pooled, weight, eps, row, n, c, exists, N, C, S, G, divisor,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, RUNNING: tl.constexpr,
):  # fmt: skip
    """Gain, slope and offset of ``dx = gain * dy + slope * (x - mean_in) + offset``."""
    _total, _product, gain, _mean, _var, dmean, dvar = _row_gradients(
        sums, saved, weight, eps, row, n, c, exists, N, C, G, KINDS, MEAN, VAR, True
    )
    mean_in = tl.load(saved + 32 + row, mask=exists, other=0)
    dmean_in = tl.zeros(exists.shape, tl.float32)
    dvar_in = tl.zeros(exists.shape, tl.float32)
    for k in tl.static_range(4):
        dmean_in, dvar_in = _add_adjoint(
            dmean_in, dvar_in, k, (KINDS >> (4 * k)) & 15, saved, pooled,
            row, n, c, exists, N, C, G, mean_in, dmean, dvar, MEAN, VAR, RUNNING,
        )  # fmt: skip
    return gain, 2 * dvar_in / divisor, dmean_in / S


@triton.jit(do_not_specialize=SHAPES)
def ssn_bwd_affine_kernel(
    sums, saved, pooled, affine, weight, eps, N, C, S, G, divisor,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, RUNNING: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Gain, slope and offset of every row, where rows are too short to compute them over x."""
    N = N.to(tl.int64)
    row, n, c, exists, _origin, _offset = row_block(tl.program_id(0), N, C, 1, ROWS, 1)
    gain, slope, offset = _row_affine(
        sums, saved, pooled, weight, eps, row, n, c, exists, N, C, S, G, divisor,
        KINDS, MEAN, VAR, RUNNING,
    )  # fmt: skip
    tl.store(affine + row, gain, mask=exists)
    tl.store(affine + N * C + row, slope, mask=exists)
    tl.store(affine + 2 * N * C + row, offset, mask=exists)


@triton.jit
def _input_gradient(
    dy, x, dx, sums, saved, pooled, affine, weight, program,
    N, C, S, G, tiles, splits, divisor, eps,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, RUNNING: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    row, n, c, exists, origin, offset = row_block(program // splits, N, C, S, ROWS, AXIS)
    first, last = position_range(program % splits, S, tiles, POSITIONS)
    lanes, offsets = tile_offsets(offset, C, POSITIONS, AXIS)
    there = tl.expand_dims(exists, AXIS)
    if HAS_ROWS:
        if affine is not None:
            gain = tl.load(affine + row, mask=exists, other=0)
            slope = tl.load(affine + N * C + row, mask=exists, other=0)
            offset = tl.load(affine + 2 * N * C + row, mask=exists, other=0)
        else:
            gain, slope, offset = _row_affine(
                sums, saved, pooled, weight, eps, row, n, c, exists, N, C, S, G, divisor,
                KINDS, MEAN, VAR, RUNNING,
            )  # fmt: skip
        mean_in = tl.load(saved + 32 + row, mask=exists, other=0)
        mean_in = tl.expand_dims(mean_in, AXIS)
        gain = tl.expand_dims(gain, AXIS)
        slope = tl.expand_dims(slope, AXIS)
        offset = tl.expand_dims(offset, AXIS)
        for position in range(first, last, POSITIONS):
            inside = there & (lanes < S - position)
            at = tile_start(origin, position, C, AXIS)
            gradient = tl.load(dy + at + offsets, mask=inside, other=0).to(tl.float32)
            value = tl.load(x + at + offsets, mask=inside, other=0).to(tl.float32)
            result = gain * gradient + (slope * (value - mean_in) + offset)
            tl.store(dx + at + offsets, result, mask=inside)
    else:
        # BN's constants alone: y is a gain times x, and a shift.
        _, var = mix(saved, None, None, row, n, c, exists, N, C, G, KINDS, MEAN, VAR, False)
        _, gain = load_gain(var, weight, c, exists, eps)
        gain = tl.expand_dims(gain, AXIS)
        for position in range(first, last, POSITIONS):
            inside = there & (lanes < S - position)
            at = tile_start(origin, position, C, AXIS)
            gradient = tl.load(dy + at + offsets, mask=inside, other=0).to(tl.float32)
            tl.store(dx + at + offsets, gain * gradient, mask=inside)


@triton.jit(do_not_specialize=SHAPES)
def ssn_bwd_dx_kernel(
    dy, x, dx, sums, saved, pooled, affine, weight, dmean_control, dvar_control,
    N, C, S, G, tiles, splits, divisor, eps,
    K: tl.constexpr, KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr,
    MAP: tl.constexpr, RUNNING: tl.constexpr, HAS_ROWS: tl.constexpr, RATIOS: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``dx = gain * dy + slope * (x - mean_in) + offset``; one more program does the ratios."""
    N = N.to(tl.int64)
    C, S = align_shape(C, S, AXIS, ALIGN)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    # The ratios' program is started first: no launch of its own for eight numbers.
    if RATIOS and program == tl.num_programs(0) - 1:
        _, _, _, partials = pooled_sections(pooled, N, C, G)
        write_control_gradient(dmean_control, partials, saved, N, K, MAP, MEAN)
        write_control_gradient(dvar_control, partials + 4, saved + 16, N, K, MAP, VAR)
    elif dx is not None:
        _input_gradient(
            dy, x, dx, sums, saved, pooled, affine, weight, program,
            N, C, S, G, tiles, splits, divisor, eps,
            KINDS, MEAN, VAR, RUNNING, HAS_ROWS, ROWS, POSITIONS, AXIS,
        )  # fmt: skip
