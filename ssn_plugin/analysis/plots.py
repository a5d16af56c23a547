"""Pictures of what a model chose. Importing this module imports matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ssn_plugin.analysis.importance_ratios import LayerRatios

# Okabe and Ito's palette, which stays distinct with every colour vision.
NORMALIZER_COLOURS = {'IN': '#E69F00', 'LN': '#56B4E9', 'BN': '#009E73', 'GN': '#CC79A7'}


def plot_selection(rows: Sequence[LayerRatios], path: Path, title: str) -> None:
    """Stacked bars of the importance ratios, one column per layer: means above, variances below.

    Args:
        rows: What :func:`ssn_plugin.analysis.importance_ratios.importance_ratios` returns.
        path: PNG or SVG file to write.
        title: Title of the figure.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError('rows: got none, expected at least one SSN or SN layer')
    figure = Figure(figsize=(max(6.0, 2.0 + 0.24 * len(rows)), 7.5), layout='constrained')
    axes = figure.subplots(2, 1, sharex=True)
    used = [n for n in NORMALIZER_COLOURS if any(n in row.normalizers for row in rows)]
    positions = range(len(rows))
    for ax, statistic in zip(axes, ('mean', 'var'), strict=True):
        bottom = [0.0] * len(rows)
        for normalizer in used:
            heights = [
                dict(zip(row.normalizers, getattr(row, f'{statistic}_ratios'), strict=True)).get(
                    normalizer, 0.0
                )
                for row in rows
            ]
            ax.bar(
                positions,
                heights,
                bottom=bottom,
                width=0.85,
                color=NORMALIZER_COLOURS[normalizer],
                label=normalizer,
            )
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        ax.set_ylim(0, 1)
        ax.set_ylabel({'mean': 'ratios of the mean', 'var': 'ratios of the variance'}[statistic])
        ax.spines[['top', 'right']].set_visible(False)
    axes[1].set_xticks(positions, [row.layer for row in rows], rotation=90, fontsize=7)
    axes[1].set_xlim(-0.6, len(rows) - 0.4)
    decided = sum(row.decided for row in rows)
    figure.suptitle(f'{title}\n{decided} of {len(rows)} layers are one normalizer')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center')
    figure.savefig(path, dpi=150)
