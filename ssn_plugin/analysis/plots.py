"""Figures of what models chose: bars over depth, shares, comparison.

Importing this module imports matplotlib.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssn_plugin.analysis.comparison import aligned, differences, headline
from ssn_plugin.analysis.figures import (
    STATISTIC_NAMES,
    in_lines,
    mark_stages,
    new_figure,
    normalizer_legend,
    normalizer_style,
    plain,
    used_normalizers,
    write_title,
)
from ssn_plugin.analysis.layer_ratios import STATISTICS, LayerRatios
from ssn_plugin.analysis.places import place_of

# A figure with more layers has several lines.
_COLUMNS = 64


class _Panel(NamedTuple):
    label: str
    statistic: str
    rows: Sequence[LayerRatios | None]
    marked: Sequence[bool] = ()


def selection_figure(rows: Sequence[LayerRatios], title: str) -> Figure:
    """Stacked bars of the importance ratios, one column per layer: means above, variances below.

    Raises:
        ValueError: If there are no rows.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN
        >>> from ssn_plugin.analysis.layer_ratios import layer_ratios
        >>> from ssn_plugin.analysis.plots import selection_figure
        >>> rows = layer_ratios(torch.nn.Sequential(SSN(8)))
        >>> len(selection_figure(rows, 'One layer').axes)
        2
    """
    _check(rows)
    panels = [
        _Panel(f'ratios of the {STATISTIC_NAMES[statistic]}', statistic, rows)
        for statistic in STATISTICS
    ]
    decided = sum(row.decided for row in rows)
    subtitle = f'{decided} of {len(rows)} layers are one normalizer, {shown_radius(rows)}'
    return _bars(panels, [row.layer for row in rows], f'{title}\n{subtitle}', 2.6)


def share_figure(rows: Sequence[LayerRatios], title: str) -> Figure:
    """Share of each normalizer by stage, by kind of layer, and in the whole network.

    A share is the importance ratio averaged over layers, which for decided layers is the part of
    them that chose the normalizer.

    Raises:
        ValueError: If there are no rows.
    """
    _check(rows)
    groups = [('all layers', rows)]
    for attribute in ('stage', 'kind'):
        names = dict.fromkeys(getattr(row.place, attribute) for row in rows)
        groups.append(None)
        groups += [(n, [r for r in rows if getattr(r.place, attribute) == n]) for n in names]
    normalizers = used_normalizers(row.normalizers for row in rows)
    figure = new_figure(9.5, 1.6 + 0.3 * len(groups))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, statistic in zip(axes, STATISTICS, strict=True):
        for position, group in enumerate(groups):
            if group is not None:
                _share_bar(ax, -position, group[1], statistic, normalizers)
        ax.set_xlim(0, 1)
        ax.set_xticks([0, 0.5, 1], ['0', '50 %', '100 %'])
        ax.set_title(f'share in the {STATISTIC_NAMES[statistic]}', fontsize=10)
        ax.spines[['top', 'right']].set_visible(False)
    there = [(-position, group) for position, group in enumerate(groups) if group is not None]
    axes[0].set_yticks(
        [position for position, _ in there], [f'{name} ({len(own)})' for _, (name, own) in there]
    )
    stages = 1 + len({row.place.stage for row in rows})
    for ax in axes:
        ax.set_ylim(-len(groups) + 0.4, 0.6)
        for gap in (-1, -1 - stages):
            ax.axhline(gap, color='#00000055', linewidth=0.8, linestyle=':')
    normalizer_legend(figure, normalizers)
    write_title(
        figure, f'{title}\nshares by stage and by kind (number of layers), {shown_radius(rows)}'
    )
    return figure


def comparison_figure(sources: Mapping[str, Sequence[LayerRatios]], title: str) -> Figure:
    """Bars of two or more models above each other; a triangle marks layers that differ.

    Raises:
        ValueError: If there are fewer than two models, or one without rows.
    """
    if len(sources) < 2:
        raise ValueError(f'sources: got {len(sources)}, expected at least 2 to compare')
    for rows in sources.values():
        _check(rows)
    names, by_source = aligned(sources)
    found = differences(sources)
    panels = []
    for statistic in STATISTICS:
        marked = [d.differs for d in found if d.statistic == statistic]
        for number, (source, rows) in enumerate(by_source.items()):
            label = f'{STATISTIC_NAMES[statistic]}\n{_wrapped(source)}'
            panels.append(_Panel(label, statistic, rows, () if number else marked))
    radii = '; '.join(map(shown_radius, sources.values()))
    return _bars(panels, names, f'{title}\n{headline(found)} (▼)\n{radii}', 1.1)


def shown_radius(rows: Sequence[LayerRatios]) -> str:
    """The radius of the layers, or that they have none, in words.

    Example:
        >>> from ssn_plugin.analysis.layer_ratios import LayerRatios
        >>> from ssn_plugin.analysis.plots import shown_radius
        >>> row = LayerRatios('sn1', ('IN', 'BN'), (0.5, 0.5), (0.5, 0.5), radius=0.25)
        >>> shown_radius([row]), shown_radius([row, row._replace(radius=1.0)])
        ('radius 0.250', 'radius 0.250 to 1.000')
    """
    radii = [row.radius for row in rows if row.radius is not None]
    if not radii:
        return 'no radius (SN)'
    low, high = (f'{value:.3f}' for value in (min(radii), max(radii)))
    return f'radius {low}' if low == high else f'radius {low} to {high}'


def _check(rows: Sequence[LayerRatios]) -> None:
    if not rows:
        raise ValueError('rows: got none, expected at least one SSN or SN layer')


def _wrapped(source: str, width: int = 11) -> str:
    """A name beside a panel, with its end where it is too long."""
    if len(source) > 4 * width:
        source = '…' + source[1 - 4 * width :]
    return in_lines(source, width)


def _bars(panels: Sequence[_Panel], layers: Sequence[str], title: str, height: float) -> Figure:
    """Panels above each other with one column per layer, in several lines if they are many."""
    lines = -(-len(layers) // _COLUMNS)
    per_line = -(-len(layers) // lines)
    normalizers = used_normalizers(
        row.normalizers for panel in panels for row in panel.rows if row is not None
    )
    figure = new_figure(max(7.0, 2.6 + 0.23 * per_line), 1.0 + lines * (2.0 + height * len(panels)))
    grid = figure.add_gridspec(lines, 1)
    number = 0
    places = [place_of(layer) for layer in layers]
    for line in range(lines):
        part = slice(line * per_line, (line + 1) * per_line)
        own = places[part]
        axes = grid[line].subgridspec(len(panels), 1, hspace=0.06).subplots(squeeze=False)[:, 0]
        for ax, panel in zip(axes, panels, strict=True):
            _columns(ax, panel.rows[part], panel.statistic, normalizers)
            ax.set_ylabel(plain(panel.label), fontsize=9)
            ax.set_yticks([0, 0.5, 1] if height > 2 else [0, 1])
            for column, marked in enumerate(panel.marked[part]):
                if marked:
                    ax.plot(column, 1.06, marker='v', color='black', markersize=5, clip_on=False)
            # The last line is as wide as the others, so that its columns are too.
            ax.set_xlim(-0.6, per_line - 0.4)
            ax.set_xticks([])
        labels = [
            place.label.replace('.downsample.1', ' shortcut').replace('.downsample', ' shortcut')
            for place in own
        ]
        axes[-1].set_xticks(range(len(own)), labels, rotation=90, fontsize=7.5)
        mark_stages(axes, [place.stage for place in own], number)
        number += len(dict.fromkeys(place.stage for place in own))
        if line + 1 < lines and places[part.stop].stage == own[-1].stage:
            number -= 1  # the stage continues in the next line
    normalizer_legend(figure, normalizers)
    write_title(figure, title)
    return figure


def _columns(
    ax: Axes,
    rows: Sequence[LayerRatios | None],
    statistic: str,
    normalizers: Sequence[str],
) -> None:
    bottom = [0.0] * len(rows)
    for normalizer in normalizers:
        heights = [row.ratios(statistic).get(normalizer, 0.0) if row else 0.0 for row in rows]
        drawn = [column for column, value in enumerate(heights) if value > 0]
        ax.bar(
            drawn,
            [heights[column] for column in drawn],
            bottom=[bottom[column] for column in drawn],
            width=0.86,
            **normalizer_style(normalizer),
        )
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for column, row in enumerate(rows):
        if row is None:
            ax.text(column, 0.5, '-', ha='center', va='center', color='#777777')
    ax.set_ylim(0, 1)
    ax.spines[['top', 'right']].set_visible(False)


def _share_bar(
    ax: Axes,
    position: float,
    rows: Sequence[LayerRatios],
    statistic: str,
    normalizers: Sequence[str],
) -> None:
    left = 0.0
    for normalizer in normalizers:
        share = sum(row.ratios(statistic).get(normalizer, 0.0) for row in rows) / len(rows)
        if share == 0:
            continue
        ax.barh(position, share, left=left, height=0.8, **normalizer_style(normalizer))
        if share >= 0.1:
            ax.text(
                left + share / 2,
                position,
                f'{100 * share:.0f}',
                ha='center',
                va='center',
                fontsize=8,
                bbox=dict(boxstyle='round,pad=0.15', facecolor='white', edgecolor='none'),
            )
        left += share
