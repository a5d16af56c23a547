"""The candidates' statistics and ratios, read from the saved numbers, and their mixture."""

import triton
import triton.language as tl


@triton.jit
def pooled_sections(base, N, C, G):
    """Sections of two numbers (mean, variance) per channel, per sample, per group; what follows."""
    samples = base + 2 * C.to(tl.int64)
    groups = samples + 2 * N
    return base, samples, groups, groups + 2 * N * G


@triton.jit
def saved_sections(saved, N, C, G, HAS_ROWS: tl.constexpr):
    """Sections of the saved numbers: after the two ratio records, of rows and of pooled ones."""
    rows = saved + 32
    if HAS_ROWS:
        channels, samples, groups, _ = pooled_sections(rows + 2 * N * C, N, C, G)
    else:
        channels, samples, groups, _ = pooled_sections(rows, N, C, G)
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
def load_candidate(
    KIND: tl.constexpr, saved, running_mean, running_var, row, n, c, inside, N, C, G,
    HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of one kind for each row; running statistics are BN's if given."""
    if KIND == 2 and running_mean is not None:
        mean = tl.load(running_mean + c, mask=inside, other=0).to(tl.float32)
        var = tl.load(running_var + c, mask=inside, other=0).to(tl.float32)
    else:
        rows, channels, samples, groups = saved_sections(saved, N, C, G, HAS_ROWS)
        mean, var = load_pair(
            KIND, rows, channels, samples, groups, row, n, c, inside, N, C, G
        )  # fmt: skip
    return mean, var


@triton.jit
def load_ratio(record, k: tl.constexpr, SELECTED: tl.constexpr):
    """Ratio of candidate k, a constant where the host knows what is selected."""
    if SELECTED < 0:
        return tl.load(record + k)
    else:
        return 1.0 if k == SELECTED else 0.0


@triton.jit
def _add_candidate(
    mean, var, k: tl.constexpr, KIND: tl.constexpr, saved, running_mean, running_var,
    row, n, c, inside, N, C, G,
    MEAN: tl.constexpr, VAR: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    if KIND < 4:
        mean_k, var_k = load_candidate(
            KIND, saved, running_mean, running_var, row, n, c, inside, N, C, G, HAS_ROWS
        )
        mean += load_ratio(saved, k, MEAN) * mean_k
        var += load_ratio(saved + 16, k, VAR) * var_k
    return mean, var


@triton.jit
def mix(
    saved, running_mean, running_var, row, n, c, inside, N, C, G,
    KINDS: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """The mixed mean and variance of each row."""
    mean = tl.zeros(inside.shape, tl.float32)
    var = tl.zeros(inside.shape, tl.float32)
    for k in tl.static_range(4):
        mean, var = _add_candidate(
            mean, var, k, (KINDS >> (4 * k)) & 15, saved, running_mean, running_var,
            row, n, c, inside, N, C, G, MEAN, VAR, HAS_ROWS,
        )  # fmt: skip
    return mean, var


@triton.jit
def load_gain(var, weight, c, inside, eps):
    """Inverse standard deviation, and that times weight; finite where there is no row."""
    inverse_std = tl.rsqrt(tl.where(inside, var + eps, 1.0))
    gain = inverse_std
    if weight is not None:
        gain *= tl.load(weight + c, mask=inside, other=0).to(tl.float32)
    return inverse_std, gain
