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
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ssn_plugin.errors import in_one_line
from ssn_plugin.ops.sparsestmax import _MAX_AMPLIFICATION, _RADIUS_TOLERANCE, circumradius
from ssn_plugin.torch_versions import HAS_CUSTOM_OPS, is_compiling

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KINDS = {'IN': 0, 'LN': 1, 'BN': 2, 'GN': 3}
_UNUSED = 15
_RATIO_MAPS = {'sparsestmax': 0, 'softmax': 1, 'given': 2}
_RECORDS = 32  # numbers that lead the saved ones: a record of 16 per ratio vector

_WARPS = 4
_TILE = 2048  # elements of x that a program holds at once; half of it where rows are short
_CHANNELS = 64  # of a tile in channels_last
_PROGRAMS = 1024  # fill a large chip
_SPLIT_TILES = 4  # rows are split into parts of at least so many tiles
_POOL_TILE = 1024  # rows that a pooling program holds at once
_POOL_SAMPLES = 128  # of at most so many samples, or channels, together
_MERGE_ROWS = 16  # of a tile of a merging program, and splits
_MERGE_SPLITS = 64
_AFFINE_ROWS = 128
# Rows of at most so many bytes, if there are so many of them, get their gain and shift in a launch
# of its own: by count of instructions the pass over x would otherwise compute more than it moves.
_SHORT_ROW = 512
_MANY_ROWS = 8192


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


def _tiling(num: int, channels: int, length: int, axis: int) -> _Tiling:
    if axis == 1:
        # The widest tile that wastes at most a quarter of its lanes on the end of a row.
        longest = min(_power_of_2(length), _TILE)
        widths = [longest >> shift for shift in range(12) if longest >> shift >= 32] or [longest]
        padded = {width: _ceil(length, width) * width for width in widths}
        positions = next(
            (width for width in widths if 3 * padded[width] <= 4 * length),
            min(widths, key=padded.get),
        )
        # Fewer rows where there would be too few programs, down to a quarter of a tile.
        rows = max(_TILE // 2 // positions, 1)
        while rows > 1 and 4 * rows * positions > _TILE and num * channels < rows * _PROGRAMS:
            rows //= 2
        blocks = _ceil(num * channels, rows)
    else:
        rows = min(_power_of_2(channels), _CHANNELS)
        # Offsets within a tile are 32 bits wide.
        positions = min(_power_of_2(length), _TILE // rows, _power_of_2(2**30 // channels))
        blocks = num * _ceil(channels, rows)
    tiles = _ceil(length, positions)
    splits = max(min(_ceil(_PROGRAMS, blocks), tiles // _SPLIT_TILES), 1)
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
    by_sample: bool  # LN or GN is needed
    ratios: bool  # the host does not know them both
    short: bool  # gain and shift get a launch of their own
    divisor: int  # of a row's sum of squares
    unbias: float  # from BN's variance to what the running variance takes
    tile: dict[str, int]
    merge: dict[str, int]
    pool: dict[str, int | bool]
    mix: dict[str, int]


@lru_cache(maxsize=4096)
def _plan(
    num: int,
    channels: int,
    length: int,
    axis: int,
    itemsize: int,
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
    members = min(_power_of_2(channels // max(groups, 1)), _POOL_TILE)
    samples = min(_power_of_2(num), _POOL_SAMPLES)
    return _Plan(
        shape=(num, channels, length),
        tiling=tiling,
        statistics=statistics,
        by_sample=not names.isdisjoint(('LN', 'GN')),
        ratios=None in selected,
        short=statistics.rows and length * itemsize <= _SHORT_ROW and num * channels >= _MANY_ROWS,
        divisor=max(length - correction, 1),
        unbias=count / (count - 1) if correction == 0 and count > 1 else 1.0,
        tile=dict(
            ROWS=tiling.rows,
            POSITIONS=tiling.positions,
            AXIS=axis,
            ALIGN=math.gcd(length if axis == 1 else channels, 8),
        ),
        merge=dict(SPLITS=min(_power_of_2(tiling.splits), _MERGE_SPLITS), ROWS=_MERGE_ROWS),
        pool=dict(
            LN='LN' in names,
            GN='GN' in names,
            BATCH=statistics.batch,
            GROUPS=min(_power_of_2(max(groups, 1)), _POOL_TILE // members),
            GROUP_CHANNELS=members,
            SAMPLES=samples,
            CHANNELS=min(_POOL_TILE // samples, _POOL_SAMPLES),
        ),
        mix=dict(KINDS=kinds, MEAN=mean, VAR=var),
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
    length = x.numel() // (num * channels)
    return _plan(num, channels, length, axis, x.element_size(), *settings)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _image(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _vector(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(
    x: Tensor,
    mean_control: Tensor,
    var_control: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Normalise, and update the running statistics; without autograd.

    Args:
        x: Shape (N, C, ...), not empty, as :func:`supports` wants it.
        mean_control: Control parameters of the means, or their ratios, shape (K,).
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
        selected: Candidates that are known on the host to have the whole ratio of the mean and of
            the variance. Where both are known no other statistic is computed.

    Returns:
        y in the dtype and memory format of x, and a float32 vector for :func:`backward`.
    """
    x, axis = laid_out(x)
    constant = not training and running_mean is not None
    settings = (tuple(normalizers), num_groups, constant, tuple(selected))
    plan = _plan_of(x, axis, correction, *settings)
    weight, bias = _contiguous(weight), _contiguous(bias)
    control = (mean_control.contiguous(), var_control.contiguous())
    buffers = (running_mean, running_var)
    running = tuple(_contiguous(buffer) for buffer in buffers)
    y, saved = _image(x), _vector(saved_size(x, *settings), x)
    update = training and running_mean is not None and plan.statistics.batch
    constants = running if plan.statistics.running else (None, None)
    with _device_of(x):
        if plan.statistics.rows:
            _row_moments(x, saved[_RECORDS:], plan)
        _pool(
            saved,
            (*control, radius, mean_fixed, var_fixed, mean_choice, var_choice),
            ratio_map,
            len(normalizers),
            running if update else (None, None),
            momentum if update else 0.0,
            plan,
        )
        _apply(x, y, saved, (weight, bias, *constants), float(eps), plan)
    if update:
        for buffer, updated in zip(buffers, running, strict=True):
            if buffer is not updated:
                buffer.copy_(updated)
    return y, saved


def _row_moments(x: Tensor, out: Tensor, plan: _Plan) -> None:
    """Row means, then row variances, (N, C) each, in one launch or, of split rows, in two."""
    num, channels, _ = plan.shape
    tiling = plan.tiling
    whole = tiling.splits == 1
    partial = out if whole else _vector(2 * tiling.splits * num * channels, x)
    cut = (*plan.shape, tiling.tiles, tiling.splits)
    _kernels().ssn_fwd_moments_kernel[(tiling.programs,)](
        x, partial, *cut, plan.divisor if whole else 1, num_warps=_WARPS, **plan.tile
    )
    if not whole:
        _kernels().ssn_fwd_merge_kernel[(_ceil(num * channels, _MERGE_ROWS),)](
            partial,
            out,
            *cut,
            plan.divisor,
            POSITIONS=tiling.positions,
            num_warps=_WARPS,
            **plan.merge,
        )


def _pool(
    saved: Tensor,
    controls: tuple[Tensor | None, ...],
    ratio_map: str,
    size: int,
    running: tuple[Tensor | None, ...],
    momentum: float | Tensor,
    plan: _Plan,
) -> None:
    """LN, GN and BN statistics, ratios and running statistics, in one launch if there is any."""
    num, channels, _ = plan.shape
    samples = num if plan.by_sample else 0
    blocks = _ceil(channels, plan.pool['CHANNELS']) if plan.statistics.batch else 0
    programs = samples + blocks + plan.ratios
    if not programs:
        return
    limit = circumradius(size)
    is_tensor = isinstance(momentum, Tensor)
    _kernels().ssn_fwd_pool_kernel[(programs,)](
        saved,
        *controls,
        *running,
        momentum if is_tensor else float(momentum),
        plan.unbias,
        limit,
        limit * (1 - _RADIUS_TOLERANCE),
        _MAX_AMPLIFICATION,
        num,
        channels,
        plan.statistics.groups,
        samples,
        blocks,
        K=size,
        MAP=_RATIO_MAPS[ratio_map],
        MEAN=plan.mix['MEAN'],
        VAR=plan.mix['VAR'],
        MOMENTUM_TENSOR=is_tensor,
        num_warps=_WARPS,
        **plan.pool,
    )


def _apply(
    x: Tensor,
    y: Tensor,
    saved: Tensor,
    given: tuple[Tensor | None, ...],
    eps: float,
    plan: _Plan,
) -> None:
    """The pass that writes y, from weight, bias and the constants of 'BN' if it has them."""
    num, channels, length = plan.shape
    tiling = plan.tiling
    affine = None
    if plan.short:
        affine = _vector(2 * num * channels, x)
        _kernels().ssn_fwd_affine_kernel[(_ceil(num * channels, _AFFINE_ROWS),)](
            saved,
            affine,
            *given,
            num,
            channels,
            plan.statistics.groups,
            eps,
            HAS_ROWS=plan.statistics.rows,
            ROWS=_AFFINE_ROWS,
            num_warps=_WARPS,
            **plan.mix,
        )
    _kernels().ssn_fwd_apply_kernel[(tiling.programs,)](
        x,
        y,
        saved,
        affine,
        *given,
        num,
        channels,
        length,
        plan.statistics.groups,
        tiling.tiles,
        tiling.splits,
        eps,
        HAS_ROWS=plan.statistics.rows,
        num_warps=_WARPS,
        **plan.mix,
        **plan.tile,
    )


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

    Returns:
        dx in the dtype and memory format of x; in float32 the gradients of both vectors of control
        parameters, (K,), dweight and dbias, (C,). None for what is not wanted.
    """
    x, axis = laid_out(x)
    dy = _laid_out_as(dy, x, axis)
    settings = (tuple(normalizers), num_groups, constant, tuple(selected))
    plan = _plan_of(x, axis, correction, *settings)
    num, channels, length = plan.shape
    tiling = plan.tiling
    size = len(normalizers)
    eps = float(eps)
    ratios = needs_control and plan.ratios
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

    by_sample = plan.by_sample or ratios
    by_channel = plan.statistics.batch or dweight is not None or dbias is not None
    sums = pooled = affine = None
    with _device_of(x):
        if by_sample or by_channel or (needs_dx and plan.statistics.rows):
            sums = _row_sums(dy, x, saved, plan)
        if by_sample or by_channel:
            # Sections as in the saved numbers, then every sample's part of the ratios' gradient.
            pooled = _vector(_pooled_size(num, channels, plan.statistics.groups) + 8 * num, x)
            samples = num if by_sample else 0
            blocks = _ceil(channels, plan.pool['CHANNELS']) if by_channel else 0
            _kernels().ssn_bwd_pool_kernel[(samples + blocks,)](
                sums,
                saved,
                pooled,
                weight,
                dweight,
                dbias,
                eps,
                num,
                channels,
                plan.statistics.groups,
                samples,
                HAS_ROWS=plan.statistics.rows,
                RATIOS=ratios,
                RAW=ratio_map == 'given',
                num_warps=_WARPS,
                **plan.mix,
                **plan.pool,
            )
        if needs_dx and plan.short:
            affine = _vector(3 * num * channels, x)
            _kernels().ssn_bwd_affine_kernel[(_ceil(num * channels, _AFFINE_ROWS),)](
                sums,
                saved,
                pooled,
                affine,
                weight,
                eps,
                num,
                channels,
                length,
                plan.statistics.groups,
                plan.divisor,
                RUNNING=plan.statistics.running,
                ROWS=_AFFINE_ROWS,
                num_warps=_WARPS,
                **plan.mix,
            )
        programs = (tiling.programs if needs_dx else 0) + ratios
        if programs:
            _kernels().ssn_bwd_dx_kernel[(programs,)](
                dy,
                x,
                dx,
                sums,
                saved,
                pooled,
                affine,
                weight,
                dmean_control,
                dvar_control,
                num,
                channels,
                length,
                plan.statistics.groups,
                tiling.tiles,
                tiling.splits,
                plan.divisor,
                eps,
                K=size,
                MAP=_RATIO_MAPS[ratio_map],
                RUNNING=plan.statistics.running,
                HAS_ROWS=plan.statistics.rows,
                RATIOS=ratios,
                num_warps=_WARPS,
                **plan.mix,
                **plan.tile,
            )
    return dx, dmean_control, dvar_control, dweight, dbias


def _row_sums(dy: Tensor, x: Tensor, saved: Tensor, plan: _Plan) -> Tensor:
    """Sums of dy, then of dy times the distance from the row's mean, (N, C) each."""
    num, channels, _ = plan.shape
    tiling = plan.tiling
    size = 2 * num * channels
    partial = _vector(tiling.splits * size, x)
    _kernels().ssn_bwd_sums_kernel[(tiling.programs,)](
        dy,
        x,
        saved,
        partial,
        *plan.shape,
        tiling.tiles,
        tiling.splits,
        HAS_ROWS=plan.statistics.rows,
        num_warps=_WARPS,
        **plan.tile,
    )
    if tiling.splits == 1:
        return partial
    sums = _vector(size, x)
    _kernels().ssn_bwd_merge_kernel[(_ceil(num * channels, _MERGE_ROWS),)](
        partial, sums, num, channels, tiling.splits, num_warps=_WARPS, **plan.merge
    )
    return sums
