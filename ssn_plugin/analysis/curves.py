"""Figure of what a training logged. Importing this module imports matplotlib."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssn_plugin.analysis.figures import new_figure, write_title
from ssn_plugin.analysis.run_logs import RunLogs

_STYLES = ('-', '--', '-.', ':')
# Leave out the metrics by object size, which would double the number of curves.
_LEFT_OUT = ('_s', '_m', '_l')


def curves_figure(logs: RunLogs, title: str) -> Figure | None:
    """Losses, learning rate and validation metrics over the iterations; None if there are none."""
    train = _names(logs.train)
    losses = [name for name in train if name.startswith('loss')]
    losses += [name for name in train if '.loss' in name]
    rates = [name for name in train if name == 'lr']
    metrics = shown_metrics(logs.val)
    panels = [
        (logs.train, losses, 'training loss'),
        (logs.train, rates, 'learning rate'),
        (logs.val, metrics, 'validation'),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    figure = new_figure(9.5, 0.8 + 2.6 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (numbers, names, label) in zip(axes, panels, strict=True):
        _lines(ax, numbers, names)
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.spines[['top', 'right']].set_visible(False)
    axes[-1].set_xlabel('iteration')
    write_title(figure, title)
    return figure


def shown_metrics(val: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Names of the metrics that are shown: neither by object size nor without a value."""
    return [
        name
        for name in _names(val)
        if not name.endswith(_LEFT_OUT) and any(v.get(name, -1) >= 0 for v in val.values())
    ]


def _names(numbers: Mapping[int, Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for values in numbers.values() for name in values))


def _lines(ax: Axes, numbers: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> None:
    colours = matplotlib.colormaps['cividis']
    for place, name in enumerate(names):
        points = [(i, values[name]) for i, values in numbers.items() if name in values]
        ax.plot(
            *zip(*points, strict=True),
            label=name,
            color='black' if place == 0 else colours(0.8 * place / len(names)),
            linewidth=1.6 if place == 0 else 1,
            linestyle=_STYLES[place % len(_STYLES)],
            marker='o' if len(points) < 15 else None,
            markersize=4,
        )
    if len(names) > 1:
        ax.legend(loc='upper left', bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
