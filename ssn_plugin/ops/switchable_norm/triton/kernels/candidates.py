"""The candidates' statistics and ratios, read from the saved numbers, and their mixture."""

import triton
import triton.language as tl


@triton.jit
def pooled_sections(base, N, C, G):
    """Sections of two numbers (mean, variance) per channel, per sample, per group."""
    samples = base + 2 * C
    return base, samples, samples + 2 * N


@triton.jit
def saved_sections(saved, N, C, G, HAS_ROWS: tl.constexpr):
    """Sections of the saved numbers: after the two ratio records, of rows and of pooled ones."""
    rows = saved + 32
    if HAS_ROWS:
        channels, samples, groups = pooled_sections(rows + 2 * N * C, N, C, G)
    else:
        channels, samples, groups = pooled_sections(rows, N, C, G)
    return rows, channels, samples, groups


@triton.jit
def load_pair(KIND: tl.constexpr, rows, channels, samples, groups, row, n, c, inside, N, C, G):
    """What a kind of statistic has for each row: mean and variance, or gradients of them."""
    if KIND == 0:
        base, at, size = rows, row, N * C
    elif KIND == 1:
        base, at, size = samples, n, N
    elif KIND == 2:
        base, at, size = channels, c, C
    else:
        base, at, size = groups, n * G + c // (C // G), N * G
    mean = tl.load(base + at, mask=inside, other=0)
    var = tl.load(base + size + at, mask=inside, other=0)
    return mean, var


@triton.jit
def load_saved(
    KIND: tl.constexpr, KINDS: tl.constexpr, saved, row, n, c, inside, N, C, G,
    HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Saved mean and variance of one kind for each row; zeros where no candidate is of it."""
    mean = tl.zeros(inside.shape, tl.float32)
    var = tl.zeros(inside.shape, tl.float32)
    for k in tl.static_range(4):
        if (KINDS >> (4 * k)) & 15 == KIND:
            rows, channels, samples, groups = saved_sections(saved, N, C, G, HAS_ROWS)
            mean, var = load_pair(KIND, rows, channels, samples, groups, row, n, c, inside, N, C, G)
    return mean, var


@triton.jit
def load_ratio(record, k: tl.constexpr, SELECTED: tl.constexpr):
    """Ratio of candidate k, a constant where the CPU knows what is selected."""
    if SELECTED < 0:
        return tl.load(record + k)
    else:
        return 1.0 if k == SELECTED else 0.0


@triton.jit
def of_kind(KIND: tl.constexpr, of_in, of_ln, of_bn, of_gn):
    """One of four, by the kind of statistic."""
    if KIND == 0:  # noqa: SIM116  (a kernel has no dictionaries)
        return of_in
    elif KIND == 1:
        return of_ln
    elif KIND == 2:
        return of_bn
    else:
        return of_gn


@triton.jit
def mix(record, of_in, of_ln, of_bn, of_gn, KINDS: tl.constexpr, SELECTED: tl.constexpr):
    """The mixture of what the kinds have for each row."""
    mixed = tl.zeros(of_in.shape, tl.float32)
    for k in tl.static_range(4):
        if (KINDS >> (4 * k)) & 15 < 4:
            value = of_kind((KINDS >> (4 * k)) & 15, of_in, of_ln, of_bn, of_gn)
            mixed += load_ratio(record, k, SELECTED) * value
    return mixed


@triton.jit
def load_gain(var, weight, c, inside, eps):
    """Inverse standard deviation, and that times weight; finite where there is no row."""
    inverse_std = tl.rsqrt(tl.where(inside, var + eps, 1.0))
    gain = inverse_std
    if weight is not None:
        gain *= tl.load(weight + c, mask=inside, other=0).to(tl.float32)
    return inverse_std, gain
