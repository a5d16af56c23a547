"""Figures of a training: paths in the simplex, and what was decided when.

Importing this module imports matplotlib.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Polygon

from ssn_plugin.analysis.figures import (
    STATISTIC_NAMES,
    as_image,
    new_figure,
    normalizer_legend,
    normalizer_style,
    save_both,
    used_normalizers,
    write_title,
)
from ssn_plugin.analysis.history import History, HistoryError, spread
from ssn_plugin.analysis.layer_ratios import STATISTICS
from ssn_plugin.analysis.places import place_of
from ssn_plugin.checkpoint.whole_file import whole_file

_MARKERS = {'stem': 'o', 'residual': 'o', 'shortcut': 's', 'FPN': '^', 'head': 'D', 'other': 'o'}
# The plane of the simplex of three candidates, true to scale: its corners are sqrt(2) apart.
_CORNERS = np.array([[0.0, 0.0], [math.sqrt(2), 0.0], [math.sqrt(0.5), math.sqrt(1.5)]])
_CENTRE = _CORNERS.mean(0)
INRADIUS, CIRCUMRADIUS = math.sqrt(1 / 6), math.sqrt(2 / 3)
# How many records of a long training are drawn; more could not be told apart.
_POINTS, _CURVE_POINTS = 120, 600
_FRAMES = 50  # of an animation, at most


def simplex_figure(history: History, title: str) -> Figure:
    """The path of every layer with three candidates in their simplex, and the circle.

    Raises:
        HistoryError: If there is no record, or no layer with three candidates.
    """
    _check(history)
    drawing = _SimplexDrawing(history.thinned(_POINTS), title)
    drawing.show(len(drawing.history.lines) - 1)
    return drawing.figure


def animate_simplex(
    history: History,
    title: str,
    path: Path,
    progress: Callable[[Sequence], Iterable] = iter,
) -> None:
    """Write the simplex figure over the training as an animated GIF.

    ``progress`` wraps the sequence of frames, to show how far it is.

    Raises:
        HistoryError: As :func:`simplex_figure`.
    """
    from PIL import Image

    _check(history)
    history = history.thinned(2 * _POINTS)
    drawing = _SimplexDrawing(history, title)
    pictures = []
    for index in progress(spread(len(history.lines), _FRAMES)):
        drawing.show(index)
        pictures.append(Image.fromarray(as_image(drawing.figure, 72)))
        # Do the layout once, so that nothing moves from frame to frame.
        drawing.figure.set_layout_engine('none')
    # One palette for all frames, or the colours of the legend would flicker.
    palette = pictures[-1].quantize(255)
    first, *others = (p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures)
    durations = [120] * len(others) + [2500]
    with whole_file(path) as temporary:
        first.save(
            temporary, 'GIF', save_all=True, append_images=others, duration=durations, loop=0
        )


def run_figure(history: History, title: str) -> Figure:
    """Loss, decided layers with the radius, and shares of the normalizers over the iterations.

    Raises:
        HistoryError: If there is no record.
    """
    _check(history)
    history = history.thinned(_CURVE_POINTS)
    iterations = [line['iter'] for line in history.lines]
    # A jump at the last record would otherwise lie on the edge of the axes and not be seen.
    end = iterations[-1] + max(0.02 * (iterations[-1] - iterations[0]), 0.5)
    figure = new_figure(9.0, 8.0)
    loss, decided, shares = figure.subplots(3, 1, sharex=True)
    known = [(line['iter'], line['loss']) for line in history.lines if line['loss'] is not None]
    loss.plot(*zip(*known, strict=True) if known else ((), ()), color='black', linewidth=1)
    loss.set_ylabel('training loss')
    if known:
        loss.set_ylim(0, 1.05 * _most(value for _, value in known))

    _draw_decided(decided, history, [*iterations, end])
    radius = decided.twinx()
    radius.plot(
        iterations,
        [line['radius'] for line in history.lines],
        color='#777777',
        linestyle=':',
        label='radius (right)',
    )
    radius.set_ylim(0, 1.05)
    radius.set_ylabel('radius')
    handles = [*decided.get_lines(), *radius.get_lines()]
    decided.legend(
        handles=handles,
        loc='lower center',
        bbox_to_anchor=(0.5, 1),
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    if has_triples(history):
        for value, text in ((INRADIUS, 'a ratio can become zero'), (CIRCUMRADIUS, 'one-hot')):
            radius.axhline(value, color='#777777', linewidth=0.6, linestyle='--')
            radius.annotate(
                f'{value:.3f}: {text}',
                (0.01, value + 0.015),
                xycoords=('axes fraction', 'data'),
                fontsize=8,
            )

    normalizers = used_normalizers(layer['normalizers'] for layer in history.layers)
    areas = shares.stackplot(iterations, _shares(history, normalizers))
    for area, normalizer in zip(areas, normalizers, strict=True):
        area.set(**normalizer_style(normalizer))
    shares.set_ylim(0, 1)
    shares.set_yticks([0, 0.5, 1], ['0', '50 %', '100 %'])
    shares.set_ylabel('share of the ratios')
    shares.set_xlabel('iteration')
    shares.set_xlim(iterations[0], end)
    for ax in (loss, shares):
        ax.spines[['top', 'right']].set_visible(False)
    normalizer_legend(figure, normalizers)
    last = history.lines[-1]
    write_title(
        figure,
        f'{title}\niteration {last["iter"]}: {last["decided"]} of {len(history.layers)} '
        f'layers are one normalizer, radius {last["radius"]:.3f}',
    )
    return figure


def write_history_figures(
    history: History,
    title: str,
    folder: Path,
    gif: bool = False,
    progress: Callable[[Sequence], Iterable] = iter,
) -> list[Path]:
    """Write :func:`run_figure` and :func:`simplex_figure` as PNG and SVG.

    ``gif`` adds the animation; ``progress`` wraps the sequence of its frames.

    Returns:
        The files: ``history.*``, and ``simplex.*`` where layers have three candidates.

    Raises:
        HistoryError: If there is no record.
    """
    figures = {'history': run_figure(history, title)}
    if has_triples(history):
        figures['simplex'] = simplex_figure(history, title)
    written = []
    for name, figure in figures.items():
        written += save_both(figure, folder, name)
    if gif and has_triples(history):
        written.append(folder / 'simplex.gif')
        animate_simplex(history, title, written[-1], progress=progress)
    return written


def has_triples(history: History) -> bool:
    """Whether any layer has three candidates, so that there is a triangle to draw."""
    return any(len(layer['normalizers']) == 3 for layer in history.layers)


def _check(history: History) -> None:
    if not history.lines:
        raise HistoryError('history: has no record yet; the training has just begun')


def _most(values) -> float:
    """Nearly the largest value: single peaks at the start would flatten the rest."""
    return float(np.percentile(list(values), 99))


def _draw_decided(ax: Axes, history: History, iterations: Sequence[int]) -> None:
    lines = [*history.lines, history.lines[-1]]  # draw the last state up to the edge
    both = [line['decided'] for line in lines]
    ax.plot(iterations, both, color='black', drawstyle='steps-post', label='decided: both')
    styles = {'mean': ('#0072B2', '--'), 'var': ('#D55E00', '-.')}
    for statistic, (colour, style) in styles.items():
        counts = [sum(1 in ratios for ratios in line[statistic]) for line in lines]
        ax.plot(
            iterations,
            counts,
            color=colour,
            linestyle=style,
            drawstyle='steps-post',
            label=f'decided: {STATISTIC_NAMES[statistic]}',
        )
    ax.set_ylim(0, 1.05 * len(history.layers))
    ax.set_ylabel(f'layers, of {len(history.layers)}')


def _shares(history: History, normalizers: Sequence[str]) -> np.ndarray:
    """Ratio of each normalizer over the records, averaged over layers and statistics."""
    totals = np.zeros((len(normalizers), len(history.lines)))
    for column, line in enumerate(history.lines):
        for statistic in STATISTICS:
            for layer, ratios in zip(history.layers, line[statistic], strict=True):
                for name, ratio in zip(layer['normalizers'], ratios, strict=True):
                    totals[normalizers.index(name), column] += ratio
    return totals / (2 * len(history.layers))


class _SimplexDrawing:
    """One triangle per statistic and triple of candidates; its paths can be cut at any record."""

    def __init__(self, history: History, title: str) -> None:
        self.history = history
        self.title = title
        triples = dict.fromkeys(
            tuple(layer['normalizers'])
            for layer in history.layers
            if len(layer['normalizers']) == 3
        )
        if not triples:
            raise HistoryError('history: has no layer with three candidates, expected one to draw')
        self.stages = list(dict.fromkeys(place_of(x['layer']).stage for x in history.layers))
        self.colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.92, len(self.stages)))
        self.figure = new_figure(11.0, 0.9 + 4.9 * len(triples))
        axes = self.figure.subplots(len(triples), 2, squeeze=False)
        self.drawn = []
        for row, names in zip(axes, triples, strict=True):
            columns = [i for i, x in enumerate(history.layers) if tuple(x['normalizers']) == names]
            for ax, statistic in zip(row, STATISTICS, strict=True):
                self.drawn.append(self._triangle(ax, names, statistic, columns))
        self.left_out = sum(len(x['normalizers']) != 3 for x in history.layers)
        self._legend()

    def _triangle(self, ax: Axes, names, statistic: str, columns: list[int]) -> tuple:
        ax.add_patch(Polygon(_CORNERS, closed=True, facecolor='none', edgecolor='black', lw=1.2))
        for radius in (0.2, INRADIUS, 0.6):
            ax.add_patch(
                Circle(_CENTRE, radius, facecolor='none', edgecolor='#00000030', lw=0.7, ls=':')
            )
        circle = Circle(_CENTRE, 0, facecolor='#0000000f', edgecolor='#D55E00', lw=1.4)
        ax.add_patch(circle)
        all_points = (
            np.array([[line[statistic][i] for line in self.history.lines] for i in columns], float)
            @ _CORNERS
        )  # layers, records, 2
        paths, ends = [], []
        for i, points in zip(columns, all_points, strict=True):
            place = place_of(self.history.layers[i]['layer'])
            colour = self.colours[self.stages.index(place.stage)]
            paths.append(ax.plot([], [], color=colour, linewidth=1, alpha=0.65)[0])
            ends.append(
                ax.plot(
                    *points[:1].T,
                    marker=_MARKERS[place.kind],
                    color=colour,
                    markeredgecolor='white',
                    markeredgewidth=0.6,
                    markersize=7,
                    zorder=3,
                )[0]
            )
        offsets = ((0, -12, 'top'), (0, -12, 'top'), (0, 10, 'bottom'))
        labels = [
            ax.annotate(
                '', corner, (x, y), textcoords='offset points', ha='center', va=va, fontsize=10
            )
            for corner, (x, y, va) in zip(_CORNERS, offsets, strict=True)
        ]
        # Room for the labels of the corners; the circle may leave it.
        ax.set_xlim(-0.16, math.sqrt(2) + 0.16)
        ax.set_ylim(-0.22, math.sqrt(1.5) + 0.2)
        ax.set_aspect('equal')
        ax.set_axis_off()
        ax.set_title(
            f'ratios of the {STATISTIC_NAMES[statistic]}\n{self._group(columns)}', fontsize=11
        )
        return statistic, names, columns, all_points, circle, paths, ends, labels

    def _group(self, columns: list[int]) -> str:
        """The layers of a row in words: how many, and of which stages."""
        stages = dict.fromkeys(place_of(self.history.layers[i]['layer']).stage for i in columns)
        told = (
            ', '.join(stages) if len(stages) <= 4 else f'{next(iter(stages))} to {list(stages)[-1]}'
        )
        return f'{len(columns)} layers: {told}'

    def _legend(self) -> None:
        handles = [
            Line2D([], [], color=colour, linewidth=2, label=stage)
            for stage, colour in zip(self.stages, self.colours, strict=True)
        ]
        kinds = dict.fromkeys(place_of(x['layer']).kind for x in self.history.layers)
        handles += [
            Line2D([], [], color='#555555', marker=_MARKERS[kind], linestyle='', label=kind)
            for kind in kinds
            if _MARKERS[kind] != 'o'
        ]
        handles.append(Line2D([], [], color='#D55E00', linewidth=1.4, label='circle'))
        self.figure.legend(handles=handles, loc='outside right center', fontsize=9)

    def show(self, index: int) -> None:
        """Draw the paths from the first record to this one."""
        line = self.history.lines[index]
        for statistic, names, columns, points, circle, paths, ends, labels in self.drawn:
            circle.set_radius(line['radius'])
            for own, path, end in zip(points, paths, ends, strict=True):
                path.set_data(*own[: index + 1].T)
                end.set_data(*own[index : index + 1].T)
            ratios = [line[statistic][i] for i in columns]
            for k, (name, label) in enumerate(zip(names, labels, strict=True)):
                count = sum(values[k] == 1 for values in ratios)
                label.set_text(f'{name}: {count} of {len(columns)}')
        left_out = f'; {self.left_out} layers without three candidates' if self.left_out else ''
        write_title(
            self.figure,
            f'{self.title}\niteration {line["iter"]}, radius {line["radius"]:.3f}, '
            f'{line["decided"]} of {len(self.history.layers)} layers are one normalizer{left_out}',
        )
