"""Triton backend: which kernels are launched, on how many programs and with what between them.

README.md beside this file says which pass reads and writes what. The kernels are imported when
they are first launched: `import ssn_plugin` never imports Triton.
"""

import importlib.util
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ssn_plugin.errors import in_one_line
from ssn_plugin.ops.sparsestmax import _MAX_AMPLIFICATION, _RADIUS_TOLERANCE, circumradius
from ssn_plugin.ops.switchable_norm.collectives import all_reduce_moments, track
from ssn_plugin.ops.switchable_norm.statistics import Moments
from ssn_plugin.torch_versions import HAS_CUSTOM_OPS, is_compiling

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KINDS = {'IN': 0, 'LN': 1, 'BN': 2, 'GN': 3}
_UNUSED = 15
_RATIO_MAPS = {'sparsestmax': 0, 'softmax': 1, 'given': 2}
_RECORDS = 32  # numbers that lead the saved ones: a record of 16 per ratio vector

_WARPS = 4
_TILE = 2048  # elements of x that a program holds at once
# Rows of at most so many positions: what follows per row is computed by two warps, not by four, of
# half a tile, as wide addresses of rows that are not aligned fill the registers.
_SHORT = 256
_SHORT_WARPS = 2
_ROWS = 128  # of a tile, at most
_CHANNELS = 64  # of a tile in channels_last, and the least there
_FEW_CHANNELS = 16
_PROGRAMS = 1024  # fill a large chip
_SPLIT_TILES = 4  # rows are split into parts of at least so many tiles
_SPLITS = 64  # and into so many at most
_POOL_TILE = 1024  # numbers per row that a program holds at once where it pools
_POOL_SAMPLES = 128  # of at most so many samples, or channels, together
_CHUNK = 2048  # partial sums of the ratios' gradients that one program of the pooling kernel adds
# The pass over x can also pool the row moments, which saves the launch of the pooling kernel, but
# then every program reads the moments that its rows share. It does so only if all programs together
# read at most _MERGE_NUMBERS (20 MB: reading them from the second-level cache takes about as long
# as a launch) and one program reads at most _MERGE_NUMBERS_OF_PROGRAM, in about ten rounds.
_MERGE_NUMBERS = 5 * 2**20
_MERGE_NUMBERS_OF_PROGRAM = 2**14
_MERGE_PARTIALS = 8192


def _find_triton() -> bool:
    try:
        return HAS_CUSTOM_OPS and bool(importlib.util.find_spec('triton'))
    except (ImportError, ValueError):  # an importer that refuses, or half a module
        return False


_INSTALLED = _find_triton()
_supported_devices: dict[int, bool] = {}


def is_available() -> bool:
    """Whether Triton is installed. It is looked for, not imported."""
    return _INSTALLED


def supports(x: Tensor) -> bool:
    """Whether the kernels can take ``x``: on a GPU, and float32, float16 or bfloat16.

    They leave ``x`` to ATen where somebody records the operators that compute with it, as
    ``torch.jit.trace`` and ``FakeTensorMode`` do: a kernel is none, and may not be run then.
    ``torch.compile`` is given operators of its own.

    On the CPU the answer is no, even where ``TRITON_INTERPRET=1`` lets :func:`forward` and
    :func:`backward` run: that is for tests, a thousand times slower than ATen.

    Args:
        x: The input of the layer.
    """
    if not (_INSTALLED and x.is_cuda and x.dtype in _DTYPES):
        return False
    if not is_compiling() and _is_recorded(x):
        return False
    return _device_is_supported(x.device.index)


def _is_recorded(x: Tensor) -> bool:
    if torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return True
    return type(x) not in (Tensor, torch.nn.Parameter)


@torch.compiler.assume_constant_result
def _device_is_supported(index: int) -> bool:
    if index not in _supported_devices:
        _refuse_during_capture()
        reason = _reason_against(index)
        _supported_devices[index] = reason is None
        if reason is not None:
            logging.getLogger(__name__).warning(
                'SSN and SN run on ATen operators on cuda:%d, which is slower, because Triton '
                'cannot compile for it: %s',
                index,
                reason,
            )
    return _supported_devices[index]


def _reason_against(index: int) -> str | None:
    """Why a device cannot take the kernels: one is tried, since nothing else tells for sure."""
    capability = torch.cuda.get_device_capability(index)
    if not torch.version.hip and capability < (7, 0):
        return f'its compute capability is {capability[0]}.{capability[1]}, below 7.0'
    try:
        with torch.cuda.device(index):
            out = torch.empty(1, device=torch.device('cuda', index))
            _kernels().ssn_probe_kernel[(1,)](out)
    except Exception as error:  # no compiler, no Python.h, a driver that is too old, and so on
        return in_one_line(error)
    return None


def _refuse_during_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            'SSN and SN compile a kernel when they meet a kind of input first, which a CUDA graph '
            'cannot capture: got such an input during a capture, expected a forward and backward '
            'pass on it before, as torch.cuda.graphs.make_graphed_callables does'
        )


@lru_cache
def _kernels() -> ModuleType:
    from ssn_plugin.ops.switchable_norm.triton import kernels

    return kernels


def _power_of_2(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


class _Tiling(NamedTuple):
    """How a pass over x is cut into programs; a tile is ``rows`` times ``positions``."""

    rows: int
    positions: int
    tiles: int  # per program
    splits: int  # programs per block of rows
    programs: int


def _row_tile(num: int, channels: int, length: int) -> tuple[int, int]:
    """Rows and positions of a tile of a contiguous x."""
    # The widest tile that wastes at most a quarter of its lanes on the end of a row.
    longest = min(_power_of_2(length), _TILE)
    widths = [longest >> shift for shift in range(12) if longest >> shift >= 32] or [longest]
    padded = {width: _ceil(length, width) * width for width in widths}
    positions = next(
        (width for width in widths if 3 * padded[width] <= 4 * length),
        min(widths, key=padded.get),
    )
    # Fewer rows where there would be too few programs, down to a quarter of a tile.
    rows = max((_TILE // 2 if positions <= _SHORT else _TILE) // positions, 1)
    rows = min(rows, _ROWS)
    while rows > 1 and 4 * rows * positions > _TILE and num * channels < rows * _PROGRAMS:
        rows //= 2
    # No rows of two samples if that leaves every lane something to do.
    whole = channels & -channels
    if whole < rows and whole * positions >= 256:
        rows = whole
    return rows, positions


def _tiling(num: int, channels: int, length: int, axis: int) -> _Tiling:
    if axis == 1:
        rows, positions = _row_tile(num, channels, length)
        blocks = _ceil(num * channels, rows)
    else:
        rows = min(_power_of_2(channels), _CHANNELS)
        while rows > _FEW_CHANNELS and num * _ceil(channels, rows) * _SPLITS < _PROGRAMS:
            rows //= 2
        # Offsets within a tile are 32 bits wide.
        positions = min(_power_of_2(length), _TILE // rows, _power_of_2(2**30 // channels))
        blocks = num * _ceil(channels, rows)
    tiles = _ceil(length, positions)
    splits = max(min(_ceil(_PROGRAMS, blocks), tiles // _SPLIT_TILES, _SPLITS), 1)
    tiles = _ceil(tiles, splits)
    splits = _ceil(length, tiles * positions)
    return _Tiling(rows, positions, tiles, splits, blocks * splits)


class _Statistics(NamedTuple):
    """Which statistics a call needs."""

    names: frozenset[str]
    rows: bool  # row moments
    groups: int  # of GN; 0 if it is not needed
    batch: bool  # BN of this batch
    running: bool  # BN as a constant


@lru_cache
def _statistics(
    normalizers: tuple[str, ...],
    num_groups: int,
    constant: bool,
    selected: tuple[int | None, int | None],
) -> _Statistics:
    used = range(len(normalizers)) if None in selected else selected
    names = frozenset(normalizers[k] for k in used)
    return _Statistics(
        names,
        rows=names != {'BN'} or not constant,
        groups=num_groups if 'GN' in names else 0,
        batch='BN' in names and not constant,
        running='BN' in names and constant,
    )


def _pooled_size(num: int, channels: int, groups: int) -> int:
    return 2 * (channels + num + num * groups)


def saved_size(x: Tensor, *settings) -> int:
    """How many numbers :func:`forward` saves for :func:`backward`."""
    statistics = _statistics(*settings)
    num, channels = x.shape[:2]
    rows = 2 * num * channels if statistics.rows else 0
    return _RECORDS + rows + _pooled_size(num, channels, statistics.groups)


class _Plan(NamedTuple):
    """All that follows from shapes and settings.

    The dicts are compile-time arguments of kernels.
    """

    shape: tuple[int, int, int]  # N, C, S
    tiling: _Tiling
    statistics: _Statistics
    saved: int  # numbers kept for backward
    by_sample: bool  # LN or GN is needed
    ratios: int  # 1 if the CPU does not know them both
    merges: bool  # the pass over x can pool by itself
    spread: bool  # a thread has elements of several rows, and would do the work of each
    divisor: int  # of a row's sum of squares
    unbias: float  # from BN's variance to what the running variance takes
    warps: int
    tile: dict[str, int]
    merge: dict[str, int]
    pool: dict[str, int]
    mix: dict[str, int]
    needs: dict[str, bool]


def _merges(num: int, channels: int, axis: int, tiling: _Tiling, statistics: _Statistics) -> bool:
    """Whether what the pass over x reads beside x is less than a launch more."""
    if statistics.groups:
        return False
    sample = batch = 0
    if 'LN' in statistics.names:
        if axis == 1 and channels % tiling.rows:
            return False  # a program would have rows of two samples
        sample = 2 * channels * tiling.splits
    if statistics.batch:
        batch = 2 * num * tiling.rows * tiling.splits
    numbers = sample + batch
    return (
        numbers <= _MERGE_NUMBERS_OF_PROGRAM
        and tiling.programs * numbers <= _MERGE_NUMBERS
        and tiling.programs <= _MERGE_PARTIALS
    )


@lru_cache(maxsize=4096)
def _plan(
    num: int,
    channels: int,
    length: int,
    axis: int,
    correction: int,
    normalizers: tuple[str, ...],
    num_groups: int,
    constant: bool,
    selected: tuple[int | None, int | None],
) -> _Plan:
    statistics = _statistics(normalizers, num_groups, constant, selected)
    names, groups = statistics.names, statistics.groups
    if len(normalizers) > len(_KINDS) or not names <= _KINDS.keys():
        raise ValueError(
            f'normalizers: got {normalizers}, expected at most {len(_KINDS)} out of '
            f'{", ".join(_KINDS)}, which the Triton kernels know; set SSN_BACKEND=eager'
        )
    kinds = 0
    for k in range(4):
        used = k < len(normalizers) and normalizers[k] in names
        kinds |= (_KINDS[normalizers[k]] if used else _UNUSED) << 4 * k
    mean, var = (-1 if index is None else index for index in selected)
    tiling = _tiling(num, channels, length, axis)
    count = num * length
    splits = _power_of_2(tiling.splits)
    tile = max(_POOL_TILE // splits, 1)
    members = min(_power_of_2(channels // max(groups, 1)), tile)
    samples = min(_power_of_2(num), _POOL_SAMPLES, tile)
    short = axis == 1 and tiling.positions <= _SHORT
    return _Plan(
        shape=(num, channels, length),
        tiling=tiling,
        statistics=statistics,
        saved=_RECORDS
        + (2 * num * channels if statistics.rows else 0)
        + _pooled_size(num, channels, groups),
        by_sample=not names.isdisjoint(('LN', 'GN')),
        ratios=int(None in selected),
        spread=statistics.rows and axis == 1 and tiling.rows > 2,
        merges=_merges(num, channels, axis, tiling, statistics),
        divisor=max(length - correction, 1),
        unbias=count / (count - 1) if correction == 0 and count > 1 else 1.0,
        warps=_SHORT_WARPS if short else _WARPS,
        tile=dict(
            ROWS=tiling.rows,
            POSITIONS=tiling.positions,
            AXIS=axis,
            ALIGN=math.gcd(length if axis == 1 else channels, 8),
            SHORT=tiling.positions >= length,
            WIDE=num * channels * length >= 2**31,
        ),
        merge=dict(
            SPLITS=splits,
            SAMPLES=min(_power_of_2(num), max(tile // tiling.rows, 1)),
            CHANNELS=min(max(_power_of_2(channels), 256), tile),  # fewer would compile more often
        ),
        pool=dict(
            SPLITS=splits,
            LN_CHANNELS=min(_power_of_2(channels), tile),
            GROUPS=min(_power_of_2(max(groups, 1)), tile // members),
            GROUP_CHANNELS=members,
            SAMPLES=samples,
            CHANNELS=min(tile // samples, _POOL_SAMPLES),
            WIDE=num * channels * length >= 2**31,
        ),
        mix=dict(KINDS=kinds, MEAN=mean, VAR=var),
        needs=dict(LN='LN' in names, GN='GN' in names, BATCH=statistics.batch),
    )


def laid_out(x: Tensor) -> tuple[Tensor, int]:
    """``x`` in a layout that the kernels read, copied if need be, and the axis of its positions."""
    if x.is_contiguous():
        return x, 1
    if x.movedim(1, -1).is_contiguous():
        return x, 0
    return x.contiguous(), 1


def _laid_out_as(dy: Tensor, x: Tensor, axis: int) -> Tensor:
    if dy.is_contiguous() if axis == 1 else dy.movedim(1, -1).is_contiguous():
        return dy
    return _image(x).copy_(dy)


def _plan_of(x: Tensor, axis: int, *settings) -> _Plan:
    num, channels = x.shape[:2]
    return _plan(num, channels, x.numel() // (num * channels), axis, *settings)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _image(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _vector(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _launch(
    name: str,
    programs: int,
    tensors: tuple[Tensor | float | None, ...],
    numbers: tuple[float, ...],
    warps: int,
    **constants,
) -> None:
    getattr(_kernels(), name)[(programs,)](*tensors, *numbers, num_warps=warps, **constants)


def forward(
    x: Tensor,
    mean_control: Tensor | None,
    var_control: Tensor | None,
    ratio_map: str,
    radius: Tensor | None,
    mean_fixed: Tensor | None,
    var_fixed: Tensor | None,
    mean_choice: Tensor | None,
    var_choice: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    training: bool,
    normalizers: Sequence[str],
    num_groups: int,
    correction: int,
    eps: float,
    selected: tuple[int | None, int | None] = (None, None),
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalise, and update the running statistics; without autograd.

    Args:
        x: Shape (N, C, ...), not empty, as :func:`supports` wants it.
        mean_control: Control parameters of the means, or their ratios, shape (K,). This,
            ``var_control`` and the five tensors from ``radius`` to ``var_choice`` may be None where
            ``selected`` holds both choices.
        var_control: The same of the variances.
        ratio_map: What makes ratios of them: 'sparsestmax', 'softmax', or 'given' for nothing.
        radius: Of SparsestMax, 0-d. It and the next four are None for the other maps.
        mean_fixed: 0-d integer; above 0 the ratios are the one-hot vector of ``mean_choice``.
        var_fixed: The same of the variances.
        mean_choice: 0-d integer; -1 is the largest control parameter, the last one among equals.
        var_choice: The same of the variances.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        running_mean: Shape (C,) or None. Updated in place if ``training`` and the statistics of
            'BN' are needed; used as constants if not ``training``.
        running_var: Shape (C,) or None.
        momentum: Weight of the new value, a number or a 0-d tensor.
        training: Whether 'BN' uses the statistics of the batch.
        normalizers: K names, at most 4.
        num_groups: Groups of 'GN'.
        correction: 0 or 1.
        eps: Added to the mixed variance.
        selected: Candidates that are known on the CPU to have the whole ratio of the mean and of
            the variance. Where both are known no other statistic is computed.
        group: Processes over whose batches together 'BN' takes its statistics, if ``training``.

    Returns:
        y in the dtype and memory format of x; a float32 vector for :func:`backward`; with a group
        the number of elements per channel in all processes, 0-d.
    """
    x, axis = laid_out(x)
    constant = not training and running_mean is not None
    normalizers = tuple(normalizers)
    plan = _plan_of(x, axis, correction, normalizers, num_groups, constant, tuple(selected))
    num, channels, _ = shape = plan.shape
    tiling, statistics, groups = plan.tiling, plan.statistics, plan.statistics.groups
    if not statistics.batch:
        group = None
    weight, bias = _contiguous(weight), _contiguous(bias)
    buffers = (running_mean, running_var)
    running = tuple(_contiguous(buffer) for buffer in buffers)
    y, saved = _image(x), _vector(plan.saved, x)
    partial = scratch = None
    if plan.spread:
        scratch = _vector(3 * num * channels, x)
    if statistics.rows and tiling.splits > 1:
        partial = _vector(2 * tiling.splits * num * channels, x)
    tracks = training and running_mean is not None and statistics.batch and group is None
    merges = plan.merges and group is None
    tracked = running if tracks else (None, None)
    momentum_tensor = tracks and isinstance(momentum, Tensor)
    new = momentum if momentum_tensor else float(momentum) if tracks else 0.0
    count = None
    with _device_of(x):
        if statistics.rows:
            limit = circumradius(len(normalizers))
            controls = (radius, mean_fixed, var_fixed, mean_choice, var_choice)
            _launch(
                'ssn_fwd_moments_kernel',
                tiling.programs + plan.ratios,
                (x, saved, partial, _contiguous(mean_control), _contiguous(var_control), *controls),
                (
                    limit,
                    limit * (1 - _RADIUS_TOLERANCE),
                    _MAX_AMPLIFICATION,
                    *shape,
                    tiling.tiles,
                    tiling.splits,
                    plan.divisor,
                ),
                plan.warps,
                K=len(normalizers),
                MAP=_RATIO_MAPS[ratio_map],
                MEAN=plan.mix['MEAN'],
                VAR=plan.mix['VAR'],
                RATIOS=plan.ratios,
                **plan.tile,
            )
        if not merges:
            samples = num if plan.by_sample else 0
            blocks = _ceil(channels, plan.pool['CHANNELS']) if statistics.batch else 0
            _launch(
                'ssn_fwd_pool_kernel',
                samples + blocks,
                (saved, partial, *tracked, new),
                (
                    plan.unbias,
                    *shape,
                    groups,
                    tiling.tiles,
                    tiling.splits,
                    plan.divisor,
                    samples,
                ),
                _WARPS,
                LN=plan.needs['LN'],
                GN=plan.needs['GN'],
                TRACKS=tracks,
                MOMENTUM_TENSOR=momentum_tensor,
                POSITIONS=tiling.positions,
                **plan.pool,
            )
        if group is not None:
            count = _share_moments(saved, buffers, momentum, training, correction, plan, group)
        _launch(
            'ssn_fwd_apply_kernel',
            tiling.programs,
            (
                x,
                y,
                saved,
                partial,
                scratch,
                weight,
                bias,
                *(running if statistics.running else tracked if merges else (None, None)),
                new if merges else 0.0,
            ),
            (
                *shape,
                groups,
                tiling.tiles,
                tiling.splits,
                plan.divisor,
                float(eps),
                plan.unbias,
            ),
            plan.warps,
            LN=plan.needs['LN'],
            BATCH=statistics.batch,
            CONSTANT=statistics.running,
            HAS_ROWS=statistics.rows,
            MERGES=merges,
            TRACKS=tracks and merges,
            MOMENTUM_TENSOR=momentum_tensor and merges,
            **plan.mix,
            **plan.merge,
            **plan.tile,
        )
    if tracks:
        for buffer, updated in zip(buffers, running, strict=True):
            if buffer is not updated:
                buffer.copy_(updated)
    return y, saved, count


def _share_moments(
    saved: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float | Tensor,
    training: bool,
    correction: int,
    plan: _Plan,
    group: ProcessGroup,
) -> Tensor:
    """Put the moments of all processes in the place of this one's, and track them."""
    num, channels, length = plan.shape
    first = _RECORDS + 2 * num * channels
    mean, var = saved[first : first + 2 * channels].view(2, 1, channels)
    batch = all_reduce_moments(Moments(mean, var), num * length, group)
    mean.copy_(batch.mean)
    var.copy_(batch.var)
    if training and running[0] is not None:
        track(Moments(*running), batch, momentum, correction)
    return batch.count


def backward(
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    ratio_map: str,
    constant: bool,
    normalizers: Sequence[str],
    num_groups: int,
    correction: int,
    eps: float,
    selected: tuple[int | None, int | None] = (None, None),
    needs_dx: bool = True,
    needs_control: bool = True,
    needs_dbias: bool = True,
    needs_dweight: bool = True,
    count: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of one call of :func:`forward`; without autograd.

    Args:
        dy: The shape and dtype of x, any strides.
        x: As given to :func:`forward`.
        saved: What :func:`forward` returned beside y.
        weight: As given to :func:`forward`.
        ratio_map: As given to :func:`forward`.
        constant: Whether 'BN' used running statistics: not ``training``, and there were buffers.
        normalizers: As given to :func:`forward`.
        num_groups: As given to :func:`forward`.
        correction: As given to :func:`forward`.
        eps: As given to :func:`forward`.
        selected: As given to :func:`forward`.
        needs_dx: Whether dx is wanted.
        needs_control: Whether the gradients of the control parameters are wanted.
        needs_dbias: Whether dbias is wanted.
        needs_dweight: Whether dweight is wanted; without a weight there is none.
        count: What :func:`forward` returned for a group.
        group: As given to :func:`forward`.

    Returns:
        dx in the dtype and memory format of x; in float32 the gradients of both vectors of control
        parameters, (K,), dweight and dbias, (C,). None for what is not wanted.
    """
    x, axis = laid_out(x)
    dy = _laid_out_as(dy, x, axis)
    normalizers = tuple(normalizers)
    plan = _plan_of(x, axis, correction, normalizers, num_groups, constant, tuple(selected))
    num, channels, length = shape = plan.shape
    tiling, statistics, groups = plan.tiling, plan.statistics, plan.statistics.groups
    size, eps = len(normalizers), float(eps)
    if not statistics.batch or not needs_dx:
        group = None
    ratios = plan.ratios if needs_control else 0
    weight = _contiguous(weight)
    dx = _image(x) if needs_dx else None
    dweight = _vector(channels, x) if needs_dweight and weight is not None else None
    dbias = _vector(channels, x) if needs_dbias else None
    dmean_control = dvar_control = None
    if needs_control:
        dmean_control, dvar_control = _vector(size, x), _vector(size, x)
        if not ratios:
            dmean_control.zero_()
            dvar_control.zero_()

    merges = plan.merges and needs_dx and group is None
    affine = dweight is not None or dbias is not None
    partials = tiling.programs if ratios else 0
    sums = pooled = None
    with _device_of(x):
        if affine or ratios or (needs_dx and statistics.rows):
            # Behind the four numbers per row is every program's part of the ratios' gradient.
            sums = _vector(4 * tiling.splits * num * channels + 8 * partials, x)
            _launch(
                'ssn_bwd_sums_kernel',
                tiling.programs,
                (dy, x, saved, sums, weight),
                (eps, *shape, groups, tiling.tiles, tiling.splits),
                plan.warps,
                HAS_ROWS=statistics.rows,
                RATIOS=ratios,
                RAW=ratio_map == 'given',
                SPREAD=plan.spread,
                **plan.mix,
                **plan.tile,
            )
            if not merges:
                # Sections as in the saved numbers, then the partial sums of fewer programs.
                chunks = _ceil(partials, _CHUNK)
                pooled = _vector(_pooled_size(num, channels, groups) + 8 * chunks, x)
                samples = num if plan.by_sample and needs_dx else 0
                by_channel = affine or (statistics.batch and needs_dx)
                blocks = _ceil(channels, plan.pool['CHANNELS']) if by_channel else 0
                if samples + blocks + chunks:
                    _launch(
                        'ssn_bwd_pool_kernel',
                        samples + blocks + chunks,
                        (sums, pooled, dweight, dbias),
                        (num, channels, groups, tiling.splits, samples, blocks, partials),
                        _WARPS,
                        RATIOS=ratios,
                        CHUNK=_CHUNK,
                        **plan.needs,
                        **plan.pool,
                    )
                partials = chunks
            if group is not None:
                _share_gradients(pooled[: 2 * channels], count, num, length, group)
        programs = (tiling.programs if needs_dx else 0) + ratios
        if programs:
            _launch(
                'ssn_bwd_dx_kernel',
                programs,
                (
                    dy,
                    x,
                    dx,
                    sums,
                    saved,
                    pooled,
                    _vector(3 * num * channels, x) if plan.spread and needs_dx else None,
                    weight,
                    dweight if merges else None,
                    dbias if merges else None,
                    dmean_control,
                    dvar_control,
                ),
                (*shape, groups, tiling.tiles, tiling.splits, plan.divisor, partials, eps),
                plan.warps,
                K=size,
                MAP=_RATIO_MAPS[ratio_map],
                HAS_ROWS=statistics.rows,
                RATIOS=ratios,
                MERGES=merges,
                **plan.needs,
                **plan.mix,
                **plan.merge,
                **plan.tile,
            )
    return dx, dmean_control, dvar_control, dweight, dbias


def _share_gradients(
    means: Tensor, count: Tensor, num: int, length: int, group: ProcessGroup
) -> None:
    """From BN's gradients per row of this process to those per row of all, in place."""
    means *= num
    dist.all_reduce(means, group=group)
    means *= length / count.clamp(min=1)
