"""``ratios.jsonl``: how the importance ratios of a training moved, written line by line.

A run begins with a line that tells what stays the same; every other one is the state after some
iteration::

    {"run": "20260102_030405_77", "layers": [{"layer": "backbone.sn1", "normalizers": ["IN", "LN",
     "BN"], "channels": 64, "sparse": true}, ...], "about": {"max_iters": 800, "versions": {...}}}
    {"run": "20260102_030405_77", "iter": 10, "radius": 0.0125, "decided": 0, "loss": 1.31,
     "mean": [[0.33, 0.33, 0.34], ...], "var": ..., "mean_fixed": [0, ...], "var_fixed": ...}

Lists follow the order of the layers. ``loss`` is averaged since the line before; ``radius`` is that
of the layers that follow the schedule. What is NaN or infinite is null. Several runs in one folder,
one after the other or at once, are told apart by ``run``; files of older versions have none.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ssn_plugin.analysis.layer_ratios import STATISTICS, LayerRatios
from ssn_plugin.checkpoint.whole_file import whole_file

HISTORY_FILE = 'ratios.jsonl'


class HistoryError(ValueError):
    """A history that cannot be read; its text is one line."""


class History(NamedTuple):
    """What a ``ratios.jsonl`` holds.

    Attributes:
        layers: What stays the same of each layer: ``layer``, ``normalizers``, ``channels`` and
            ``sparse``, which is true of an SSN and false of an SN.
        about: Facts of the run: ``max_iters``, ``versions``.
        lines: The records, in the order of their ``iter``.
        runs: Names of all runs in the file, in the order in which they began.
    """

    layers: list[dict]
    about: dict
    lines: list[dict]
    runs: tuple[str, ...] = ()

    def rows(self, index: int = -1) -> list[LayerRatios]:
        """The layers at one record, the last one by default."""
        line = self.lines[index]
        values = (line[key] for key in ('mean', 'var', 'mean_fixed', 'var_fixed'))
        return [
            LayerRatios(
                layer['layer'],
                tuple(layer['normalizers']),
                tuple(mean),
                tuple(var),
                line['radius'] if layer['sparse'] else None,
                bool(mean_fixed),
                bool(var_fixed),
                layer['channels'],
            )
            for layer, mean, var, mean_fixed, var_fixed in zip(self.layers, *values, strict=True)
        ]

    def thinned(self, count: int) -> 'History':
        """With fewer records, evenly spread, the first and the last among them."""
        return self._replace(lines=[self.lines[i] for i in spread(len(self.lines), count)])


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` indices, which is at least 2, out of ``total``, evenly, with both ends.

    Example:
        >>> from ssn_plugin.analysis.history import spread
        >>> spread(101, 3), spread(2, 3)
        ([0, 50, 100], [0, 1])
    """
    wanted = min(total, count)
    return sorted({round(i * (total - 1) / max(wanted - 1, 1)) for i in range(wanted)})


def start_history(
    path: Path,
    rows: Sequence[LayerRatios],
    about: Mapping[str, object],
    iteration: int = 0,
    run: str | None = None,
) -> str:
    """Begin a file, a new run in a file, or go on with the run that is resumed.

    Of a resumed run, lines after the iteration at which it resumes are dropped, and all where its
    layers are others now. Dropped, too, are a line that a kill cut off and what is no history.

    ``iteration`` is how many are done: 0 begins a new run. ``run`` names the one that is resumed,
    None is the last one in the file.

    Returns:
        Name of the run, for :func:`append_to_history`.
    """
    layers = [
        dict(
            layer=row.layer,
            normalizers=list(row.normalizers),
            channels=row.channels,
            sparse=row.radius is not None,
        )
        for row in rows
    ]
    try:
        before = _runs_in(path) if path.is_file() else {}
    except HistoryError:
        before = {}
    if not iteration:
        run = None
    elif run is None:
        run = next(reversed(before), None)
    if run is None:
        run = _new_name(before)
    own = before.pop(run, History([], {}, []))
    lines = [line for line in own.lines if line['iter'] <= iteration and own.layers == layers]
    before[run] = History(layers, dict(about), lines)
    with whole_file(path) as temporary, temporary.open('w') as file:
        for name, history in before.items():
            content = dict(run=name, layers=history.layers, about=history.about)
            for line in (content, *map(_without_nan, history.lines)):
                file.write(json.dumps(line, allow_nan=False) + '\n')
    return run


def _new_name(taken: Mapping[str, object]) -> str:
    name = f'{time.strftime("%Y%m%d_%H%M%S")}_{os.getpid()}'
    while name in taken:
        name += '_again'
    return name


def append_to_history(
    path: Path,
    iteration: int,
    rows: Sequence[LayerRatios],
    radius: float,
    loss: float | None,
    run: str | None = None,
) -> None:
    """Add the state after an iteration.

    The layers are in the order of the file. ``run`` is what :func:`start_history` returned; None
    where a file is of one run.
    """
    line = {} if run is None else dict(run=run)
    line |= dict(
        iter=iteration,
        radius=radius,
        decided=sum(row.decided for row in rows),
        loss=loss if loss is not None and math.isfinite(loss) else None,
    )
    for statistic in STATISTICS:
        line[statistic] = [
            [_rounded(ratio) for ratio in getattr(row, f'{statistic}_ratios')] for row in rows
        ]
    for statistic in STATISTICS:
        line[f'{statistic}_fixed'] = [int(getattr(row, f'{statistic}_fixed')) for row in rows]
    with path.open('a') as file:
        file.write(json.dumps(line, allow_nan=False) + '\n')


def _without_nan(line: Mapping) -> dict:
    return _with_ratios(line, lambda ratio: None if math.isnan(ratio) else ratio)


def _with_nan(line: Mapping) -> dict:
    return _with_ratios(line, lambda ratio: math.nan if ratio is None else ratio)


def _with_ratios(line: Mapping, change: Callable) -> dict:
    changed = {
        statistic: [list(map(change, ratios)) for ratios in line[statistic]]
        for statistic in STATISTICS
    }
    return {**line, **changed}


def _rounded(ratio: float) -> float | None:
    if not math.isfinite(ratio):
        return None
    # Round down: a ratio may be shown as 1 only if it is 1, because that means decided.
    return int(ratio) if ratio in (0, 1) else min(round(ratio, 6), 0.999999)


def read_history(path: Path, run: str | None = None) -> History:
    """Read a ``ratios.jsonl``, also while a training writes to it.

    Args:
        path: The file, or the work dir with it.
        run: Which of several runs; None is the one that began last.

    Raises:
        HistoryError: If there is no such file or run, or it is none.
    """
    if path.suffix != '.jsonl':
        path = path / HISTORY_FILE
    if not path.is_file():
        raise HistoryError(
            f'{path}: no such file; SSNRatioHook writes it while a config with '
            "custom_hooks=[dict(type='SSNRatioHook')] trains"
        )
    runs = _runs_in(path)
    run = next(reversed(runs)) if run is None else run
    if run not in runs:
        raise HistoryError(f'{path}: run: got {run!r}, expected one of {", ".join(runs)}')
    return runs[run]._replace(runs=tuple(runs))


def _runs_in(path: Path) -> dict[str, History]:
    """The runs of a file by their names; that of an older version is ''."""
    try:
        texts = path.read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError as error:
        raise HistoryError(f'{path}: cannot read it: {error.strerror}') from error
    runs: dict[str, History] = {}
    for number, text in enumerate(texts, 1):
        line = _parsed(text)
        if line is None and number == len(texts) and runs:
            break  # the line is being written, or a kill cut it off
        name = line.get('run', next(reversed(runs), '')) if isinstance(line, dict) else ''
        name = name if isinstance(name, str) else ''
        if isinstance(line, dict) and _are_layers(line.get('layers')):
            runs.pop(name, None)
            runs[name] = History(line['layers'], _facts(line.get('about')), [])
        elif not runs:
            raise HistoryError(f'{path}: is no history of SSNRatioHook')
        elif name not in runs or not _is_record(line, runs[name].layers):
            raise HistoryError(f'{path}: line {number} is no record of SSNRatioHook')
        else:
            runs[name].lines.append(_with_nan(line))
    if not runs:
        raise HistoryError(f'{path}: is no history of SSNRatioHook')
    return runs


def _parsed(text: str) -> object:
    try:
        # Older versions wrote NaN, which is not JSON.
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def _facts(about: object) -> dict:
    """What a line tells of its run, as far as it is of the kind that it has to be."""
    kinds = dict(max_iters=int, versions=dict)
    about = about if isinstance(about, dict) else {}
    return {n: v for n, v in about.items() if isinstance(v, kinds.get(n, object))}


def _are_layers(value: object) -> bool:
    kinds = dict(layer=str, normalizers=list, channels=int | None, sparse=bool)
    return isinstance(value, list) and all(
        isinstance(layer, dict)
        and all(name in layer and isinstance(layer[name], kinds[name]) for name in kinds)
        and all(isinstance(name, str) for name in layer['normalizers'])
        for layer in value
    )


def _are_numbers(values: Iterable) -> bool:
    return all(isinstance(value, int | float | None) for value in values)


def _is_record(line: object, layers: Sequence[Mapping]) -> bool:
    """Whether a line has the state of each layer after some iteration."""
    if not isinstance(line, dict) or not {'radius', 'decided', 'loss'} <= line.keys():
        return False
    if not _are_numbers((line['radius'], line['decided'], line['loss'])):
        return False
    flags, ratios = (
        [line.get(f'{statistic}{what}') for statistic in STATISTICS] for what in ('_fixed', '')
    )
    return (
        isinstance(line.get('iter'), int)
        and all(
            isinstance(values, list) and len(values) == len(layers) for values in flags + ratios
        )
        and all(map(_are_numbers, flags))
        and all(
            isinstance(own, list) and len(own) == len(layer['normalizers']) and _are_numbers(own)
            for values in ratios
            for own, layer in zip(values, layers, strict=True)
        )
    )
