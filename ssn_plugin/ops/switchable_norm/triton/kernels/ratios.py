"""Control parameters to ratios and back: vectors of 4 lanes, K of them in use.

A record of 16 numbers per ratio vector: 4 ratios; 4 of the direction n; 4 of the support; the
slope of the Jacobian; whether the ratios are fixed.
"""

import triton
import triton.language as tl


@triton.jit
def _place(values, rank, lanes):
    """Move lane i of ``values`` to lane ``rank[i]``."""
    hit = tl.expand_dims(rank, 0) == tl.expand_dims(lanes, 1)
    return tl.sum(tl.where(hit, tl.expand_dims(values, 0), 0.0), 1)


@triton.jit
def _take(values, rank, lanes):
    """Fetch into lane i what lane ``rank[i]`` of ``values`` holds; undoes ``_place``."""
    hit = tl.expand_dims(rank, 1) == tl.expand_dims(lanes, 0)
    return tl.sum(tl.where(hit, tl.expand_dims(values, 0), 0.0), 1)


@triton.jit
def _ranks(z, lanes, K: tl.constexpr):
    """Rank of every entry, 0 for the largest; among equals the last candidate comes first."""
    mine, other = tl.expand_dims(z, 1), tl.expand_dims(z, 0)
    later = tl.expand_dims(lanes, 0) > tl.expand_dims(lanes, 1)
    before = (other > mine) | ((other == mine) & later)
    before = before & tl.expand_dims(lanes < K, 0)
    return tl.where(lanes < K, tl.sum(before.to(tl.int32), 1), lanes)


@triton.jit
def _sparsestmax(z, radius, lanes, limit, one_hot_from, max_slope, K: tl.constexpr):
    """ops/sparsestmax.py line by line; see there and its README."""
    used = lanes < K
    infinite = used & ~(tl.abs(z) < float('inf'))
    defined = (tl.sum(infinite.to(tl.int32), 0) == 0) & (radius == radius)
    z = tl.where(used & defined, z, 0.0)
    rank = _ranks(z, lanes, K)
    # Exact inverses of 1 to 4: a GPU's division may miss the 1.0 that one-hot is recognised by.
    inverse = tl.where(lanes == 0, 1.0, tl.where(lanes == 1, 0.5, 0.25))
    inverse = tl.where(lanes == 2, 1 / 3, inverse)
    ranks = lanes + 1
    faces = tl.expand_dims(lanes, 1)  # face k - 1 has the k largest entries
    entries = tl.expand_dims(lanes, 0)
    inside = ((entries <= faces) & (faces < K)).to(tl.float32)

    ordered = _place(z, rank, lanes)
    top = tl.sum(tl.where(lanes == 0, ordered, 0.0), 0)
    gaps = tl.maximum(ordered - top, -3.4028234663852886e38 / (4 * K))
    gaps = tl.where(used, gaps, 0.0)
    gap_rows = tl.expand_dims(gaps, 0)

    sums = tl.sum(gap_rows * inside, 1)
    in_simplex = used & (1 + ranks * gaps > sums)
    simplex_support = tl.sum(in_simplex.to(tl.int32), 0)
    chosen = lanes == simplex_support - 1
    threshold = tl.sum(tl.where(chosen, (sums - 1) * inverse, 0.0), 0)
    simplex = tl.where(ranks <= simplex_support, tl.maximum(gaps - threshold, 0.0), 0.0)
    from_centre = tl.where(used, simplex - 1 / K, 0.0)
    distance = tl.sqrt(tl.sum(from_centre * from_centre, 0))
    beyond = radius >= one_hot_from
    outside = (distance >= radius) & (beyond == 0)

    clamped = tl.minimum(tl.maximum(radius, 0.0), limit)
    reach = tl.sqrt(tl.maximum(clamped * clamped - (inverse - 1 / K), 0.0))
    spread = -gaps
    tie = spread == 0
    tie_rows = tl.expand_dims(tie, 1)
    inverse_rows = tl.expand_dims(inverse, 1)
    scaled = gap_rows / tl.expand_dims(tl.where(tie, 1.0, spread), 1) * inside
    mean = tl.sum(scaled, 1) * inverse
    deviation = (scaled - tl.expand_dims(mean, 1)) * inside
    toward_first = (entries == 0).to(tl.float32) - inside * inverse_rows
    deviation = tl.where(tie_rows, toward_first, deviation)
    length = tl.sqrt(tl.sum(deviation * deviation, 1))
    direction = deviation / tl.expand_dims(tl.maximum(length, 1.1754943508222875e-38), 1)
    spread = length * spread
    last = tl.sum(tl.where(entries == faces, direction, 0.0), 1)
    lowest = inverse + reach * last
    support = tl.max(tl.where(used & (tie | (lowest >= 0)), ranks, 0), 0)
    support = tl.where(beyond, 1, support)

    chosen = lanes == support - 1
    direction = tl.sum(tl.where(tl.expand_dims(chosen, 1), direction, 0.0), 0)
    reach = tl.sum(tl.where(chosen, reach, 0.0), 0)
    spread = tl.sum(tl.where(chosen, spread, 0.0), 0)
    tied = tl.sum((chosen & tie).to(tl.int32), 0) > 0
    share = tl.sum(tl.where(chosen, inverse, 0.0), 0)
    circle = tl.where(ranks <= support, tl.maximum(share + reach * direction, 0.0), 0.0)
    # Which radius is one-hot was compared above. A GPU's division and square root may miss by a
    # digit, and must not round a point of a smaller circle to the vertex.
    circle = tl.where(beyond, circle, tl.minimum(circle, 0.99999994))

    on_circle = (outside | tied) == 0
    p = tl.where(outside, simplex, circle)
    one_hot = tl.sum((p == 1).to(tl.int32), 0) > 0
    p = tl.where(one_hot, (p == 1).to(tl.float32), p)
    p = tl.where(defined, p, float('nan'))
    support = tl.where(outside, simplex_support, support)
    slope = tl.minimum(reach / tl.where(tied, 1.0, spread), max_slope)
    slope = tl.where(on_circle, tl.where(support == 2, 0.0, slope), 1.0)
    direction = tl.where(on_circle, direction, 0.0)
    in_support = (ranks <= support).to(tl.float32)
    return (
        _take(p, rank, lanes),
        _take(direction, rank, lanes),
        _take(in_support, rank, lanes),
        slope,
    )


@triton.jit
def write_ratios(
    record, control, radius, fixed, choice, limit, one_hot_from, max_slope,
    K: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """The record of one ratio vector; MAP is 0 for SparsestMax, 1 for softmax, 2 for ratios."""
    lanes = tl.arange(0, 4)
    used = lanes < K
    z = tl.load(control + lanes, mask=used, other=0).to(tl.float32)
    if MAP == 0:
        p, direction, support, slope = _sparsestmax(
            z, tl.load(radius).to(tl.float32), lanes, limit, one_hot_from, max_slope, K
        )
        is_fixed = tl.load(fixed) > 0
        chosen = tl.load(choice)
        # NaN counts as the largest, as for torch.argmax.
        order = _ranks(tl.where(z == z, z, float('inf')), lanes, K)
        largest = tl.sum(tl.where(order == 0, lanes, 0), 0)
        chosen = tl.where(chosen < 0, largest, chosen)
        p = tl.where(is_fixed, (lanes == chosen).to(tl.float32), p)
        tl.store(record + 4 + lanes, direction)
        tl.store(record + 8 + lanes, support)
        tl.store(record + 12, slope)
        tl.store(record + 13, is_fixed.to(tl.float32))
    elif MAP == 1:
        exponential = tl.exp(z - tl.max(tl.where(used, z, float('-inf')), 0))
        exponential = tl.where(used, exponential, 0.0)
        p = exponential / tl.sum(exponential, 0)
    else:
        p = z
    tl.store(record + lanes, p)


@triton.jit
def sum_partials(partials, first, last):
    """Sum of vectors of 8: the gradients of 4 ratios of the mean, then of the variance."""
    lanes = tl.expand_dims(tl.arange(0, 256), 1)
    places = tl.expand_dims(tl.arange(0, 8), 0)
    total = tl.zeros((256, 8), tl.float32)
    for start in range(first, last, 256):
        there = (start + lanes < last) & (places < 8)
        total += tl.load(partials + (start + lanes) * 8 + places, mask=there, other=0)
    return tl.sum(total, 0)


@triton.jit
def write_control_gradient(
    out, found, start: tl.constexpr, record,
    K: tl.constexpr, MAP: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """The Jacobian of the ratios, applied to the gradients that begin at ``start`` of ``found``."""
    lanes = tl.arange(0, 4)
    if SELECTED >= 0:
        dz = tl.zeros((4,), tl.float32)
    else:
        place = tl.expand_dims(tl.arange(0, 8), 0)
        mine = (place == tl.expand_dims(lanes, 1) + start) & tl.expand_dims(lanes < K, 1)
        dz = tl.sum(tl.where(mine, tl.expand_dims(found, 0), 0.0), 1)
        if MAP == 0:
            direction = tl.load(record + 4 + lanes)
            support = tl.load(record + 8 + lanes)
            dz *= support
            dz = (dz - tl.sum(dz, 0) / tl.sum(support, 0)) * support
            dz -= direction * tl.sum(direction * dz, 0)
            dz = tl.where(tl.load(record + 13) > 0, 0.0, tl.load(record + 12) * dz)
        elif MAP == 1:
            p = tl.load(record + lanes)
            dz = p * (dz - tl.sum(p * dz, 0))
    tl.store(out + lanes, dz, mask=lanes < K)
