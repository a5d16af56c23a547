"""Where a program's part of x lies, and how moments are merged."""

import triton
import triton.language as tl

# Shapes change from image to image in detection: one compiled kernel has to serve them all.
SHAPES = ['N', 'C', 'S', 'G', 'tiles', 'splits', 'divisor', 'samples', 'blocks', 'count']


@triton.jit
def ssn_probe_kernel(out):
    """Tells whether this GPU takes kernels at all."""
    tl.store(out, 1.0)


@triton.jit
def widened(number, WIDE: tl.constexpr):
    """64 bits where x has too many elements for 32: index arithmetic takes the type of N."""
    if WIDE:
        return number.to(tl.int64)
    else:
        return number.to(tl.int32)


@triton.jit
def align_shape(C, S, AXIS: tl.constexpr, ALIGN: tl.constexpr):
    """C and S, the inner one of them written so that the compiler sees what divides it."""
    if AXIS == 1:
        return C, S // ALIGN * ALIGN
    else:
        return C // ALIGN * ALIGN, S


@triton.jit
def row_block(block, N, C, S, ROWS: tl.constexpr, AXIS: tl.constexpr):
    """The rows of one block.

    Returns:
        Row numbers n * C + c, n and c, which rows exist; the sample of the first row; where in x
        the first row begins (both scalars in the type of N) and how far from there the others do.
    """
    lanes = tl.arange(0, ROWS)
    if AXIS == 1:
        first = block.to(N.dtype) * ROWS
        row = first + lanes
        sample = first // C
        column = (first - sample * C).to(tl.int32) + lanes
        n = sample + column // C
        c = column % C
        there = row < N * C
        origin = first * S
        offset = lanes * S
    else:
        blocks = tl.cdiv(C, ROWS)
        sample = (block // blocks).to(N.dtype)
        start = block % blocks * ROWS
        n = sample + tl.zeros((ROWS,), N.dtype)
        c = start + lanes
        row = sample * C + c
        there = c < C
        origin = sample * S * C + start
        offset = lanes
    return row, n, c, there, sample, origin, offset


@triton.jit
def position_range(split, N, S, tiles, SHORT: tl.constexpr, POSITIONS: tl.constexpr):
    """The first position of a split of the rows, in the type of N, and the one after its last.

    Where a row is one tile, bounds of which the compiler sees that they hold one.
    """
    if SHORT:
        return 0, 1
    else:
        first = split.to(N.dtype) * tiles * POSITIONS
        return first, tl.minimum(first + tiles * POSITIONS, S)


@triton.jit
def tile_offsets(offset, C, POSITIONS: tl.constexpr, AXIS: tl.constexpr):
    """Positions of a tile counted from its first, along AXIS, and offsets of its elements."""
    lanes = tl.expand_dims(tl.arange(0, POSITIONS), 1 - AXIS)
    if AXIS == 1:
        return lanes, tl.expand_dims(offset, AXIS) + lanes
    else:
        return lanes, tl.expand_dims(offset, AXIS) + lanes * C


@triton.jit
def tile_start(origin, position, C, AXIS: tl.constexpr):
    """Where in x the tile at ``position`` begins."""
    if AXIS == 1:
        return origin + position
    else:
        return origin + C * position


@triton.jit
def zero_tile(ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr):
    """A tile of zeros."""
    if AXIS == 1:
        return tl.zeros((ROWS, POSITIONS), tl.float32)
    else:
        return tl.zeros((POSITIONS, ROWS), tl.float32)


@triton.jit
def lane_counts(length, lanes, WIDTH: tl.constexpr):
    """How many of ``length`` elements, taken ``WIDTH`` at a time, fall to each lane."""
    return ((length - lanes + (WIDTH - 1)) // WIDTH).to(tl.float32)


@triton.jit
def merge_lanes(mean, m2, counts, total, AXIS: tl.constexpr):
    """Mean and sum of squared distances of all lanes together, along ``AXIS``."""
    rough = tl.sum(mean * counts, AXIS) / total
    # Of distances from a mean, not of the values: their sum has no digits to lose.
    mean_all = rough + tl.sum((mean - tl.expand_dims(rough, AXIS)) * counts, AXIS) / total
    distance = mean - tl.expand_dims(mean_all, AXIS)
    return mean_all, tl.sum(m2 + distance * distance * counts, AXIS)


@triton.jit
def hand_over(scratch, first, second, third, row, exists, size):
    """Three numbers per row, from a row per thread to all threads that have elements of the row.

    Without it the compiler lets each of those threads compute the numbers of all its rows.
    """
    tl.store(scratch + row, first, mask=exists)
    tl.store(scratch + size + row, second, mask=exists)
    tl.store(scratch + 2 * size + row, third, mask=exists)
    tl.debug_barrier()
    first = tl.load(scratch + row, mask=exists, other=0)
    second = tl.load(scratch + size + row, mask=exists, other=0)
    third = tl.load(scratch + 2 * size + row, mask=exists, other=0)
    return first, second, third
