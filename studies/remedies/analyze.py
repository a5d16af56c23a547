"""The tables of results.csv beside the rows of transfer, the verdicts, and the figure."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ssn_plugin.analysis.figures import new_figure, save_both
from studies.ledger import ROOT, add_analyze_arguments, read
from studies.remedies.recipe import BATCHES, REMEDIES, TASKS
from studies.small_batches.analyze import STYLE
from studies.tables import markdown, put_into, verdict
from studies.transfer.analyze import MARGIN, NETWORKS, SCORES, Comparison, images

# Rows of transfer: what is changed, and what it is compared with.
UNCHANGED, OTHERS = 'SSN', ('GN', 'SN', 'BN')
AGAINST = (UNCHANGED, 'GN')
COLOURS = ('#D55E00', '#000000', '#0072B2')  # unchanged, remedies, other norms


def joined(
    rows: Sequence[dict[str, str]], transferred: Sequence[dict[str, str]]
) -> list[dict[str, str]]:
    """The rows of both studies, a remedy in the place of a norm.

    Args:
        rows: Of results.csv.
        transferred: Of the results.csv of transfer.
    """
    return [*({**row, 'data': 'demo', 'norm': row['remedy']} for row in rows), *transferred]


def score_table(comparison: Comparison) -> str:
    """Remedies, and what they are compared with, by batch size: mean, smallest and largest.

    Args:
        comparison: One task.
    """
    column, score = SCORES[comparison.task]
    lines = []
    for name in (UNCHANGED, *REMEDIES, *OTHERS):
        cells = [comparison.cell(column, name, batch) for batch in BATCHES]
        counts = [str(len(comparison.scores(name, batch))) for batch in BATCHES]
        lines.append([_label(name), *cells, ' / '.join(counts)])
    return markdown([score, *map(images, BATCHES), 'seeds'], lines)


def verdict_table(comparison: Comparison) -> str:
    """Each remedy against SSN without it and against GN.

    Args:
        comparison: One task.
    """
    lines = [
        [
            _label(remedy),
            *(
                verdict(comparison.scores(remedy, batch), comparison.scores(other, batch), MARGIN)
                for other in AGAINST
                for batch in BATCHES
            ),
        ]
        for remedy in REMEDIES
    ]
    head = [f'against {_label(other)}, {images(batch)}' for other in AGAINST for batch in BATCHES]
    return markdown(['', *head], lines)


def _label(name: str) -> str:
    return {UNCHANGED: 'SSN as it is'}.get(name, name)


def report(rows: Sequence[dict[str, str]], transferred: Sequence[dict[str, str]]) -> str:
    """All tables, size by size.

    Args:
        rows: Of results.csv.
        transferred: Of the results.csv of transfer.
    """
    parts = []
    for size in sorted({row['size'] for row in rows}):
        parts.append(f'Size `{size}`, in %, mean (smallest-largest) over seeds.')
        own = [row for row in joined(rows, transferred) if row['size'] == size]
        for task in TASKS:
            comparison = Comparison(own, 'demo', task)
            parts += [f'{NETWORKS[task]}:', score_table(comparison), verdict_table(comparison)]
    return '\n\n'.join(parts) or 'Not yet run.'


def remedies_figure(rows: Sequence[dict[str, str]], title: str) -> Figure:
    """Score of every remedy, a panel per task and batch size.

    Args:
        rows: As ``joined`` makes them, of one size.
        title: Title of the figure.
    """
    names = [UNCHANGED, *REMEDIES, *OTHERS]
    colours = [COLOURS[0], *[COLOURS[1]] * len(REMEDIES), *[COLOURS[2]] * len(OTHERS)]
    figure = new_figure(10, 3.4)
    panels = [(task, batch) for task in TASKS for batch in BATCHES]
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (task, batch) in zip(axes, panels, strict=True):
        comparison = Comparison(rows, 'demo', task)
        for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
            values = comparison.scores(name, batch)
            mark = STYLE.get(name, STYLE['BN'])[1]
            ax.scatter(values, [place] * len(values), color=colour, marker=mark, s=26)
            if values:
                mean = sum(values) / len(values)
                ax.plot([mean, mean], [place - 0.3, place + 0.3], color=colour, linewidth=1.2)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_yticks(range(len(names)), [_label(name) for name in names])
        scores = [value for name in names for b in BATCHES for value in comparison.scores(name, b)]
        ax.set_xlim(0, 1.08 * max(scores, default=1))
        ax.set_xlabel(f'{SCORES[task][1]}, %')
        ax.set_title(f'{NETWORKS[task]}, {images(batch)}', fontsize=10)
        ax.grid(axis='x', color='#00000022')
        ax.spines[['top', 'right']].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    """Print the tables, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python -m studies.remedies.analyze'
    )
    add_analyze_arguments(parser, 'remedies')
    parser.add_argument(
        '--transfer-results',
        type=Path,
        default=ROOT / 'studies' / 'transfer',
        help='folder of the results.csv of transfer (default: %(default)s)',
    )
    args = parser.parse_args()
    rows = read(args.results / 'results.csv')
    transferred = read(args.transfer_results / 'results.csv')
    text = report(rows, transferred)
    print(text)
    put_into(args.out / 'README.md', text)
    for size in sorted({row['size'] for row in rows}):
        own = [row for row in joined(rows, transferred) if row['size'] == size]
        title = (
            f'SSN as it is, with remedies, and other norms, size {size}: a mark per run, bar: mean'
        )
        save_both(remedies_figure(own, title), args.out, f'scores_{size}')


if __name__ == '__main__':
    main()
