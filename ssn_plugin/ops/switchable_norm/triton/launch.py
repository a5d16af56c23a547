"""Triton backend: which kernels are launched, on how many programs and with what between them.

README.md in ops/ says which pass reads and writes what. The kernels, and Triton with them, are
imported when they are first launched.
"""

import importlib.util
import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ssn_plugin.errors import in_one_line
from ssn_plugin.ops.sparsestmax import _MAX_AMPLIFICATION, _RADIUS_TOLERANCE, circumradius
from ssn_plugin.ops.switchable_norm.collectives import all_reduce_moments, track
from ssn_plugin.ops.switchable_norm.ratios import has_values
from ssn_plugin.ops.switchable_norm.statistics import Moments
from ssn_plugin.ops.switchable_norm.triton import direct
from ssn_plugin.ops.switchable_norm.triton.direct import Launch
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
# Whole rows that a program keeps, of a layer that is decided on IN: 32 registers of each of 512
# threads for x and as many for dy; half of it where rows lie side by side in memory.
_WHOLE = 2**14
_WHOLE_WARPS = 16
_POOL_TILE = 1024  # numbers per row that a program holds at once where it pools
_POOL_SAMPLES = 128  # of at most so many samples, or channels, together
_POOL_MEMBERS = 64  # channels of a group
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
    """
    if not (_INSTALLED and x.is_cuda and x.dtype in _DTYPES):
        return False
    if not (is_compiling() or has_values(x)):
        return False
    return _device_is_supported(x.device.index)


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
            direct.kernels().ssn_probe_kernel[(1,)](out)
    except Exception as error:  # no compiler, no Python.h, a driver that is too old, and so on
        return in_one_line(error)
    return None


def _refuse_during_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(direct.CAPTURE)


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
    return _rows_beside(positions, num, channels), positions


def _rows_beside(positions: int, num: int, channels: int) -> int:
    """Rows of a tile of so many positions of a contiguous x."""
    # Fewer rows where there would be too few programs, down to a quarter of a tile.
    rows = max((_TILE // 2 if positions <= _SHORT else _TILE) // positions, 1)
    rows = min(rows, _ROWS)
    while rows > 1 and 4 * rows * positions > _TILE and num * channels < rows * _PROGRAMS:
        rows //= 2
    # No rows of two samples if that leaves every lane something to do.
    whole = channels & -channels
    if whole < rows and whole * positions >= 256:
        rows = whole
    return rows


def _channels_of_a_tile(num: int, channels: int) -> int:
    """Rows of a tile of a channels_last x."""
    rows = min(_power_of_2(channels), _CHANNELS)
    while rows > _FEW_CHANNELS and num * _ceil(channels, rows) * _SPLITS < _PROGRAMS:
        rows //= 2
    return rows


def _tiling(num: int, channels: int, length: int, axis: int) -> _Tiling:
    if axis == 1:
        rows, positions = _row_tile(num, channels, length)
        blocks = _ceil(num * channels, rows)
    else:
        rows = _channels_of_a_tile(num, channels)
        # Offsets within a tile are 32 bits wide.
        positions = min(_power_of_2(length), _TILE // rows, _power_of_2(2**30 // channels))
        blocks = num * _ceil(channels, rows)
    tiles = _ceil(length, positions)
    splits = max(min(_ceil(_PROGRAMS, blocks), tiles // _SPLIT_TILES, _SPLITS), 1)
    tiles = _ceil(tiles, splits)
    splits = _ceil(length, tiles * positions)
    return _Tiling(rows, positions, tiles, splits, blocks * splits)


def _whole_tiling(num: int, channels: int, length: int, axis: int) -> _Tiling | None:
    """Tiles of whole rows; None where a row is too long for one."""
    positions, most = _power_of_2(length), _WHOLE
    if axis == 1:
        rows = _rows_beside(positions, num, channels)
        blocks = _ceil(num * channels, rows)
    else:
        rows, most = _channels_of_a_tile(num, channels), _WHOLE // 2
        while rows > _FEW_CHANNELS and rows * positions > most:
            rows //= 2
        blocks = num * _ceil(channels, rows)
    fits = rows * positions <= most and (axis == 1 or positions * channels <= 2**30)
    return _Tiling(rows, positions, 1, 1, blocks) if fits else None


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


def saved_size(num: int, channels: int, *settings) -> int:
    """How many numbers :func:`forward` saves for :func:`backward`."""
    statistics = _statistics(*settings)
    rows = 2 * num * channels if statistics.rows else 0
    return _RECORDS + rows + _pooled_size(num, channels, statistics.groups)


class _Plan(NamedTuple):
    """All that follows from shapes and settings.

    The dicts are compile-time arguments of kernels.
    """

    shape: tuple[int, int, int]  # N, C, S
    normalizers: tuple[str, ...]
    tiling: _Tiling
    statistics: _Statistics
    saved: int  # numbers kept for backward
    partial: int  # numbers of splits, where rows are split and their moments are needed
    by_sample: bool  # LN or GN is needed
    ratios: int  # 1 if the CPU does not know them both
    whole: bool  # decided on IN, of rows that a program keeps: x is read once, each way
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
    whole = None
    if names == {'IN'} and None not in selected:
        whole = _whole_tiling(num, channels, length, axis)
    tiling = whole or _tiling(num, channels, length, axis)
    count = num * length
    splits = _power_of_2(tiling.splits)
    # Of x, or of the sums of its rows, at most 7 numbers per row and split.
    wide = num * channels * max(length, 7 * tiling.splits) >= 2**31
    tile = max(_POOL_TILE // splits, 1)
    # With more of them at once ptxas keeps two numbers in memory on sm_80.
    members = min(_power_of_2(channels // max(groups, 1)), tile, _POOL_MEMBERS)
    samples = min(_power_of_2(num), _POOL_SAMPLES, tile)
    warps = _SHORT_WARPS if axis == 1 and tiling.positions <= _SHORT else _WARPS
    if whole:
        warps = max(_WARPS, min(tiling.rows * tiling.positions // 512, _WHOLE_WARPS))
    return _Plan(
        shape=(num, channels, length),
        normalizers=normalizers,
        tiling=tiling,
        statistics=statistics,
        saved=saved_size(num, channels, normalizers, num_groups, constant, selected),
        partial=2 * tiling.splits * num * channels if statistics.rows and tiling.splits > 1 else 0,
        by_sample=not names.isdisjoint(('LN', 'GN')),
        ratios=int(None in selected),
        spread=statistics.rows and axis == 1 and tiling.rows > 2 and not whole,
        whole=whole is not None,
        merges=_merges(num, channels, axis, tiling, statistics),
        divisor=max(length - correction, 1),
        unbias=count / (count - 1) if correction == 0 and count > 1 else 1.0,
        warps=warps,
        tile=dict(
            ROWS=tiling.rows,
            POSITIONS=tiling.positions,
            AXIS=axis,
            ALIGN=math.gcd(length if axis == 1 else channels, 8),
            SHORT=tiling.positions >= length,
            WIDE=wide,
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
            WIDE=wide,
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


def _kinds(given: Sequence[Tensor | None], x: Tensor) -> tuple:
    """Device and dtypes, by which compiled kernels are told apart; all must be on that device.

    A kernel takes any address, and one of another device would end the process.
    """
    device = x.get_device()
    found = [t if t is None else t.dtype for t in given if t is None or t.get_device() == device]
    if len(found) == len(given):
        return device, x.dtype, *found
    for name, tensor in zip(_FORWARD[_GIVEN:], given, strict=False):
        if tensor is not None and tensor.get_device() != device:
            raise RuntimeError(
                f'{name}: got a tensor on {tensor.device}, expected {x.device}, where x is; move '
                'the layer with layer.to(x.device)'
            )


def _image(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _vector(size: int, like: Tensor) -> Tensor:
    if like.dtype == torch.float32:  # to name a dtype takes a fifth of the time
        return like.new_empty(size)
    return like.new_empty(size, dtype=torch.float32)


# The tensors of a forward and of a backward pass; ``number`` is the momentum, if it is no tensor.
_FORWARD = (
    'x', 'y', 'saved', 'partial', 'scratch',
    'mean_control', 'var_control', 'radius', 'mean_fixed', 'var_fixed', 'mean_choice', 'var_choice',
    'weight', 'bias', 'running_mean', 'running_var', 'momentum', 'nothing', 'number',
)  # fmt: skip
_GIVEN = _FORWARD.index('mean_control')  # from here on they are the layer's
_BACKWARD = (
    'dy', 'x', 'dx', 'saved', 'sums', 'pooled', 'weight',
    'dweight', 'dbias', 'dmean_control', 'dvar_control', 'nothing',
)  # fmt: skip


def _places(order: tuple[str, ...], *names: str) -> tuple[int, ...]:
    return tuple(map(order.index, names))


class _Forward(NamedTuple):
    """All of a forward pass that is known before there is a tensor."""

    plan: _Plan
    launches: tuple[Launch, ...]
    tracks: bool  # the kernels update the running statistics
    shares: bool  # the last launch waits for the moments of other processes


@lru_cache(maxsize=4096)
def _forward_pass(
    settings: tuple, ratio_map: str, tracks: bool, by_tensor: bool, shares: bool, eps: float
) -> _Forward:
    """Launches of a forward pass.

    Args:
        settings: Arguments of :func:`_plan`.
        ratio_map: As in :func:`forward`.
        tracks: Whether there are running statistics to update.
        by_tensor: Whether the momentum is a tensor.
        shares: Whether there are other processes.
        eps: As in :func:`forward`.
    """
    plan = _plan(*settings)
    tiling, statistics = plan.tiling, plan.statistics
    size, groups = len(plan.normalizers), statistics.groups
    shares = shares and statistics.batch
    tracks = tracks and statistics.batch and not shares
    merges = plan.merges and not shares
    rows = (tiling.tiles, tiling.splits, plan.divisor)
    tracked = ('running_mean', 'running_var', 'momentum' if by_tensor else 'number')
    nothing = ('nothing', 'nothing', 'number')
    launches = []
    if statistics.rows and not plan.whole:
        limit = circumradius(size)
        launches.append(
            Launch(
                'ssn_fwd_moments_kernel',
                tiling.programs + plan.ratios,
                _places(_FORWARD, 'x', 'saved', 'partial', *_FORWARD[5:12]),
                (limit, limit * (1 - _RADIUS_TOLERANCE), _MAX_AMPLIFICATION, *plan.shape, *rows),
                plan.warps,
                K=size,
                MAP=_RATIO_MAPS[ratio_map],
                MEAN=plan.mix['MEAN'],
                VAR=plan.mix['VAR'],
                RATIOS=plan.ratios,
                **plan.tile,
            )
        )
    samples = plan.shape[0] if plan.by_sample else 0
    blocks = _ceil(plan.shape[1], plan.pool['CHANNELS']) if statistics.batch else 0
    if samples + blocks and not merges:
        launches.append(
            Launch(
                'ssn_fwd_pool_kernel',
                samples + blocks,
                _places(_FORWARD, 'saved', 'partial', *(tracked if tracks else nothing)),
                (plan.unbias, *plan.shape, groups, *rows, samples),
                _WARPS,
                LN=plan.needs['LN'],
                GN=plan.needs['GN'],
                TRACKS=tracks,
                MOMENTUM_TENSOR=by_tensor and tracks,
                POSITIONS=tiling.positions,
                **plan.pool,
            )
        )
    here = tracks and merges
    used = (*tracked[:2], 'number') if statistics.running else tracked if here else nothing
    launches.append(
        Launch(
            'ssn_fwd_apply_kernel',
            tiling.programs,
            _places(_FORWARD, 'x', 'y', 'saved', 'partial', 'scratch', 'weight', 'bias', *used),
            (*plan.shape, groups, *rows, eps, plan.unbias),
            plan.warps,
            LN=plan.needs['LN'],
            BATCH=statistics.batch,
            CONSTANT=statistics.running,
            HAS_ROWS=statistics.rows,
            WHOLE=plan.whole,
            MERGES=merges,
            TRACKS=here,
            MOMENTUM_TENSOR=by_tensor and here,
            **plan.mix,
            **plan.merge,
            **plan.tile,
        )
    )
    return _Forward(plan, tuple(launches), tracks, shares)


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
    num, channels = x.shape[:2]
    settings = (
        num, channels, x.numel() // (num * channels), axis, correction, tuple(normalizers),
        num_groups, not training and running_mean is not None, tuple(selected),
    )  # fmt: skip
    by_tensor = isinstance(momentum, Tensor)
    plan, launches, tracks, shares = _forward_pass(
        settings,
        ratio_map,
        training and running_mean is not None,
        by_tensor,
        group is not None,
        float(eps),
    )
    partial = scratch = None
    if plan.spread:
        scratch = _vector(3 * num * channels, x)
    if plan.partial:
        partial = _vector(plan.partial, x)
    y, saved = _image(x), _vector(plan.saved, x)
    given = [
        t if t is None or t.is_contiguous() else t.contiguous()
        for t in (
            mean_control, var_control, radius, mean_fixed, var_fixed, mean_choice, var_choice,
            weight, bias, running_mean, running_var, momentum if by_tensor else None,
        )
    ]  # fmt: skip
    call = (
        (x, y, saved, partial, scratch, *given, None),
        0.0 if by_tensor else float(momentum),
        _kinds(given, x),
    )
    count = None
    if shares:
        direct.run(launches[:-1], *call)
        buffers = running_mean, running_var
        count = _share_moments(saved, buffers, momentum, training, correction, plan, group)
        launches = launches[-1:]
    direct.run(launches, *call)
    if tracks:
        for buffer, updated in zip((running_mean, running_var), given[-3:-1], strict=True):
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


class _Backward(NamedTuple):
    """All of a backward pass that is known before there is a tensor."""

    plan: _Plan
    launches: tuple[Launch, ...]
    sums: int  # numbers in `sums`
    pooled: int  # numbers in `pooled`
    shares: bool  # the last launch waits for the gradients of other processes


@lru_cache(maxsize=4096)
def _backward_pass(
    settings: tuple, ratio_map: str, wanted: tuple[bool, ...], shares: bool, eps: float
) -> _Backward:
    """Launches of a backward pass.

    Args:
        settings: Arguments of :func:`_plan`.
        ratio_map: As in :func:`backward`.
        wanted: Gradients: of x, control parameters, bias and weight.
        shares: Whether there are other processes.
        eps: As in :func:`backward`.
    """
    plan = _plan(*settings)
    needs_dx, needs_control, *affine = wanted
    num, channels, _ = plan.shape
    tiling, statistics, groups = plan.tiling, plan.statistics, plan.statistics.groups
    shares = shares and needs_dx and statistics.batch
    ratios = plan.ratios if needs_control else 0
    whole = plan.whole and needs_dx
    merges = plan.merges and needs_dx and not shares and not whole
    partials = tiling.programs if ratios else 0
    sums = pooled = 0
    launches = []
    if any(affine) or ratios or (needs_dx and statistics.rows and not whole):
        # Four numbers per row and split, three per row that are handed over, and every program's
        # part of the ratios' gradient.
        sums = (4 * tiling.splits + 3 * plan.spread) * num * channels + 8 * partials
    if sums and not whole:
        launches.append(
            Launch(
                'ssn_bwd_sums_kernel',
                tiling.programs,
                _places(_BACKWARD, 'dy', 'x', 'saved', 'sums', 'weight'),
                (eps, *plan.shape, groups, tiling.tiles, tiling.splits),
                plan.warps,
                HAS_ROWS=statistics.rows,
                RATIOS=ratios,
                RAW=ratio_map == 'given',
                SPREAD=plan.spread,
                **plan.mix,
                **plan.tile,
            )
        )
    if sums and not merges:
        # Sections as in the saved numbers, then the partial sums of fewer programs.
        chunks = _ceil(partials, _CHUNK)
        pooled = _pooled_size(num, channels, groups) + 8 * chunks
        samples = num if plan.by_sample and needs_dx else 0
        by_channel = any(affine) or (statistics.batch and needs_dx)
        blocks = _ceil(channels, plan.pool['CHANNELS']) if by_channel else 0
        if samples + blocks + chunks:
            launches.append(
                Launch(
                    'ssn_bwd_pool_kernel',
                    samples + blocks + chunks,
                    _places(_BACKWARD, 'sums', 'pooled', 'dweight', 'dbias'),
                    (num, channels, groups, tiling.splits, samples, blocks, partials),
                    _WARPS,
                    RATIOS=ratios,
                    SPREAD=plan.spread,
                    CHUNK=_CHUNK,
                    **plan.needs,
                    **plan.pool,
                )
            )
        partials = chunks
    programs = (tiling.programs if needs_dx else 0) + ratios
    if programs:
        vectors = ('dweight', 'dbias') if merges else ('nothing', 'nothing')
        places = ('dy', 'x', 'dx', 'sums', 'saved', 'pooled', 'weight', *vectors)
        launches.append(
            Launch(
                'ssn_bwd_dx_kernel',
                programs,
                _places(_BACKWARD, *places, 'dmean_control', 'dvar_control'),
                (*plan.shape, groups, tiling.tiles, tiling.splits, plan.divisor, partials, eps),
                plan.warps,
                K=len(plan.normalizers),
                MAP=_RATIO_MAPS[ratio_map],
                HAS_ROWS=statistics.rows,
                WHOLE=whole,
                RATIOS=ratios,
                SPREAD=plan.spread,
                MERGES=merges,
                **plan.needs,
                **plan.mix,
                **plan.merge,
                **plan.tile,
            )
        )
    if whole:  # what it makes per row is what the other one pools
        launches.reverse()
    return _Backward(plan, tuple(launches), sums, pooled, shares)


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
    """Gradients of one call of :func:`forward`, with its arguments; without autograd.

    dy may have any strides; ``saved`` and ``count`` are what :func:`forward` returned beside y;
    ``constant`` says that 'BN' used running statistics. Returns dx in the dtype and memory format
    of x; in float32 the gradients of both vectors of control parameters, (K,), dweight and dbias,
    (C,). None for what is not wanted; without a weight there is no dweight.
    """
    x, axis = laid_out(x)
    dy = _laid_out_as(dy, x, axis)
    num, channels = x.shape[:2]
    length = x.numel() // (num * channels)
    settings = (
        num, channels, length, axis, correction, tuple(normalizers), num_groups, constant,
        tuple(selected),
    )  # fmt: skip
    needs_dweight = needs_dweight and weight is not None
    wanted = (needs_dx, needs_control, needs_dbias, needs_dweight)
    plan, launches, sums, pooled, shares = _backward_pass(
        settings, ratio_map, wanted, group is not None, float(eps)
    )
    dx = _image(x) if needs_dx else None
    dweight = _vector(channels, saved) if needs_dweight else None
    dbias = _vector(channels, saved) if needs_dbias else None
    dmean_control = dvar_control = None
    if needs_control:
        size = len(normalizers)
        dmean_control, dvar_control = _vector(size, saved), _vector(size, saved)
        if not plan.ratios:
            dmean_control.zero_()
            dvar_control.zero_()
    sums = _vector(sums, saved) if sums else None
    pooled = _vector(pooled, saved) if pooled else None
    weight = None if weight is None else weight.contiguous()
    call = (
        (
            dy, x, dx, saved, sums, pooled, weight,
            dweight, dbias, dmean_control, dvar_control, None,
        ),
        0.0,
        (x.get_device(), x.dtype, dy.dtype, None if weight is None else weight.dtype),
    )  # fmt: skip
    if shares:
        direct.run(launches[:-1], *call)
        _share_gradients(pooled[: 2 * channels], count, num, length, group)
        launches = launches[-1:]
    direct.run(launches, *call)
    return dx, dmean_control, dvar_control, dweight, dbias


def _share_gradients(
    means: Tensor, count: Tensor, num: int, length: int, group: ProcessGroup
) -> None:
    """From BN's gradients per row of this process to those per row of all, in place."""
    means *= num
    dist.all_reduce(means, group=group)
    means *= length / count.clamp(min=1)
