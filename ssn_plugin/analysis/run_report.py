"""``report.html``: what a training was, how it went, and what its layers chose."""

import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssn_plugin.analysis.config_summary import summarise
from ssn_plugin.analysis.history import HISTORY_FILE, History, read_history
from ssn_plugin.analysis.layer_ratios import LayerRatios
from ssn_plugin.analysis.run_logs import RunLogs, read_run_logs
from ssn_plugin.checkpoint.whole_file import whole_file
from ssn_plugin.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE = 'report.html'
# Heading and text of each figure in the report.
_CAPTIONS = {
    'selection': (
        'What each layer chose',
        'Importance ratios of each layer, in the order of the network. A column of one colour is a '
        'layer that is one normalizer.',
    ),
    'shares': (
        'Shares',
        'Importance ratio of each normalizer, averaged over the layers of a stage or of a kind.',
    ),
    'history': (
        'From mixing to one normalizer',
        'A layer is decided when its ratios are one-hot. Of three candidates the circle can '
        'rule out one from radius 0.408 on, and leaves one alone at 0.816.',
    ),
    'simplex': (
        'Paths in the simplex',
        'Each layer starts near the centre, where it mixes all candidates, and is pushed '
        'outwards by the growing circle, into a corner in the end.',
    ),
}


def write_run_report(
    work_dir: Path,
    config: Mapping | None = None,
    rows: list[LayerRatios] | None = None,
    path: Path | None = None,
) -> Path:
    """Write the report of a training that has ended, was interrupted, or still runs.

    It is drawn from what lies in the folder: the text of the config, the history of
    ``SSNRatioHook``, and the numbers that mmengine logged.

    Args:
        work_dir: Folder of the training; it exists.
        config: The config, where it can be read.
        rows: What the layers chose, for a folder without a history.
        path: File to write, ``report.html`` in that folder by default.

    Raises:
        InputError: If the history is empty or a file cannot be read.
        HistoryError: If there is neither a history that can be read, nor ``rows``.
    """
    # Imported here, because it needs jinja2.
    from ssn_plugin.analysis.report_page import Page, render_page

    history = read_history(work_dir) if rows is None else None
    if history is not None and not history.lines:
        raise InputError(
            f'{work_dir / HISTORY_FILE}: has no record yet; the training has just begun'
        )
    rows = history.rows() if history else rows
    try:
        logs = read_run_logs(work_dir)
        config_file = dumped_config(work_dir)
        config_text = (
            config_file.read_text(encoding='utf-8', errors='replace') if config_file else ''
        )
    except OSError as error:
        raise InputError(f'{work_dir}: cannot read all of it: {error.strerror}') from error
    about = history.about if history else {}
    title = config_file.stem if config_file else work_dir.resolve().name
    page = Page(
        title=title,
        status=_status(work_dir, history, logs),
        headlines=list(_headlines(rows, history, logs)),
        sections=summarise(config, about.get('max_iters')) if config else [],
        pictures=list(_pictures(title, rows, history, logs)),
        rows=rows,
        config=config_text,
        versions=about.get('versions', {}),
    )
    path = path or work_dir / REPORT_FILE
    with whole_file(path) as temporary:
        temporary.write_text(render_page(page), encoding='utf-8')
    return path


def dumped_config(work_dir: Path) -> Path | None:
    """The config that the last run in a folder has dumped."""
    dumped = sorted(work_dir.glob('*.py'), key=lambda path: path.stat().st_mtime)
    return dumped[-1] if dumped else None


def figure_images(work_dir: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The figures of a training with a history, for a visualizer.

    Yields:
        Name and RGB image, uint8, (H, W, 3).
    """
    from ssn_plugin.analysis.figures import as_image

    history = read_history(work_dir)
    for name, figure in _figures(work_dir.resolve().name, history.rows(), history):
        yield f'ssn_{name}', as_image(figure)


def _figures(
    title: str, rows: list[LayerRatios], history: History | None
) -> Iterator[tuple[str, 'Figure']]:
    """What the report and a visualizer show of the selection, each by its name."""
    from ssn_plugin.analysis.history_plots import has_triples, run_figure, simplex_figure
    from ssn_plugin.analysis.plots import selection_figure, share_figure

    yield 'selection', selection_figure(rows, title)
    yield 'shares', share_figure(rows, title)
    if history:
        yield 'history', run_figure(history, title)
        if has_triples(history):
            yield 'simplex', simplex_figure(history, title)


def _status(work_dir: Path, history: History | None, logs: RunLogs) -> str:
    parts = [work_dir.resolve().name]
    if history:
        done, total = history.lines[-1]['iter'], history.about.get('max_iters')
        if total and done >= total:
            parts.append(f'ended after {done} iterations')
        else:
            parts.append(f'at iteration {done}' + (f' of {total}' if total else ''))
    if logs.starts:
        parts.append(f'started {_time(logs.starts[0])}')
        if len(logs.starts) > 1:
            times = len(logs.starts) - 1
            told = 'once, ' if times == 1 else f'{times} times, last '
            parts.append(f'resumed {told}{_time(logs.starts[-1])}')
    parts.append(f'report of {datetime.datetime.now():%Y-%m-%d %H:%M}')
    return ' · '.join(parts)


def _time(name: str) -> str:
    try:
        return f'{datetime.datetime.strptime(name, "%Y%m%d_%H%M%S"):%Y-%m-%d %H:%M}'
    except ValueError:
        return name


def _headlines(
    rows: list[LayerRatios], history: History | None, logs: RunLogs
) -> Iterator[tuple[str, str]]:
    from ssn_plugin.analysis.curves import shown_metrics
    from ssn_plugin.analysis.plots import shown_radius

    yield 'layers that are one normalizer', f'{sum(row.decided for row in rows)} of {len(rows)}'
    yield 'radius of the circle', shown_radius(rows).removeprefix('radius ')
    if history and history.lines[-1]['loss'] is not None:
        yield 'training loss', f'{history.lines[-1]["loss"]:.4g}'
    if logs.val:
        last = max(logs.val)
        for name in shown_metrics({last: logs.val[last]})[:6]:
            short = name.rpartition('/')[2]
            yield f'{short}, iteration {last}', f'{logs.val[last][name]:.4g}'


def _pictures(title: str, rows: list[LayerRatios], history: History | None, logs: RunLogs):
    from ssn_plugin.analysis.curves import curves_figure
    from ssn_plugin.analysis.figures import as_svg
    from ssn_plugin.analysis.report_page import Picture

    for name, figure in _figures(title, rows, history):
        yield Picture(*_CAPTIONS[name], as_svg(figure))
    curves = curves_figure(logs, title)
    if curves is not None:
        yield Picture('Training', 'What mmengine logged.', as_svg(curves))
