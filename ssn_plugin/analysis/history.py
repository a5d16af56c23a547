"""``ratios.jsonl``: how the importance ratios of a training moved, written line by line.

The first line tells what stays the same, every other one the state after some iteration::

    {"layers": [{"layer": "backbone.sn1", "normalizers": ["IN", "LN", "BN"], "channels": 64,
     "sparse": true}, ...], "about": {"max_iters": 800, "versions": {...}}}
    {"iter": 10, "radius": 0.0125, "decided": 0, "loss": 1.31, "mean": [[0.33, 0.33, 0.34], ...],
     "var": ..., "mean_fixed": [0, ...], "var_fixed": ...}

Lists follow the order of the layers. ``loss`` is averaged since the line before; ``radius`` is that
of the layers that follow the schedule.
"""

import json
import math
from collections.abc import Mapping, Sequence
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
    """

    layers: list[dict]
    about: dict
    lines: list[dict]

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
    """At most ``count`` indices out of ``total``, evenly, with both ends.

    Args:
        total: How many there are.
        count: How many are wanted, at least 2.

    Example:
        >>> from ssn_plugin.analysis.history import spread
        >>> spread(101, 3), spread(2, 3)
        ([0, 50, 100], [0, 1])
    """
    wanted = min(total, count)
    return sorted({round(i * (total - 1) / max(wanted - 1, 1)) for i in range(wanted)})


def start_history(
    path: Path, rows: Sequence[LayerRatios], about: Mapping[str, object], iteration: int = 0
) -> None:
    """Begin a file, or go on with that of a resumed run.

    Lines after the iteration at which the run resumes are dropped, as are a line that a kill cut
    off and the lines of other layers.
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
    lines = []
    if iteration and path.is_file():
        try:
            before = read_history(path)
        except HistoryError:
            before = History([], {}, [])
        if before.layers == layers:
            lines = [line for line in before.lines if line['iter'] <= iteration]
    with whole_file(path) as temporary, temporary.open('w') as file:
        for content in (dict(layers=layers, about=dict(about)), *lines):
            file.write(json.dumps(content) + '\n')


def append_to_history(
    path: Path, iteration: int, rows: Sequence[LayerRatios], radius: float, loss: float | None
) -> None:
    """Add the state after an iteration.

    Args:
        path: File of :func:`start_history`.
        iteration: Iterations done.
        rows: The layers, in the order of the file.
        radius: Current radius of the schedule.
        loss: Training loss, None if unknown.
    """
    line = dict(
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
        file.write(json.dumps(line) + '\n')


def _rounded(ratio: float) -> float:
    # Only what is one may read as one: that is what "decided" means.
    return int(ratio) if ratio in (0, 1) else min(round(ratio, 6), 0.999999)


def read_history(path: Path) -> History:
    """Read a ``ratios.jsonl``, also while a training writes to it.

    Args:
        path: The file, or the work dir with it.

    Raises:
        HistoryError: If there is no such file, or it is none.
    """
    if path.suffix != '.jsonl':
        path = path / HISTORY_FILE
    if not path.is_file():
        raise HistoryError(
            f'{path}: no such file; SSNRatioHook writes it while a config with '
            "custom_hooks=[dict(type='SSNRatioHook')] trains"
        )
    try:
        texts = path.read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError as error:
        raise HistoryError(f'{path}: cannot read it: {error.strerror}') from error
    first = _parsed(texts[0]) if texts else None
    if not isinstance(first, dict) or not _are_layers(first.get('layers')):
        raise HistoryError(f'{path}: is no history of SSNRatioHook')
    layers, about = first['layers'], first.get('about')
    lines = []
    for number, text in enumerate(texts[1:], 2):
        line = _parsed(text)
        if line is None and number == len(texts):
            break  # it is being written, or a kill cut it off
        if not _is_record(line, layers):
            raise HistoryError(f'{path}: line {number} is no record of SSNRatioHook')
        lines.append(line)
    return History(layers, about if isinstance(about, dict) else {}, lines)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _are_layers(value: object) -> bool:
    names = {'layer', 'normalizers', 'channels', 'sparse'}
    return isinstance(value, list) and all(isinstance(v, dict) and names <= v.keys() for v in value)


def _is_record(line: object, layers: Sequence[Mapping]) -> bool:
    """Whether a line has the state of each layer after some iteration."""
    if not isinstance(line, dict) or not {'radius', 'decided', 'loss'} <= line.keys():
        return False
    flags, ratios = (
        [line.get(f'{statistic}{what}') for statistic in STATISTICS] for what in ('_fixed', '')
    )
    return (
        isinstance(line.get('iter'), int)
        and all(
            isinstance(values, list) and len(values) == len(layers) for values in flags + ratios
        )
        and all(
            isinstance(own, list) and len(own) == len(layer['normalizers'])
            for values in ratios
            for own, layer in zip(values, layers, strict=True)
        )
    )
