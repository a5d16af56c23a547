"""The table of results.csv, what differs by the rule of the protocol, and the figure."""

import argparse
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.figure import Figure

from ssn_plugin.analysis.figures import new_figure, save_both
from studies.ledger import add_analyze_arguments, read
from studies.tables import markdown, put_into, spread, verdict

NORMS = ('BN', 'GN', 'SN', 'SSN', 'SSN-radius0')
BATCHES = (32, 8, 2)
MARGIN = 3.0  # percentage points, see README.md
# Okabe and Ito's palette and different marks, for every colour vision.
STYLE = {
    'BN': ('#009E73', 'o'),
    'GN': ('#CC79A7', 's'),
    'SN': ('#56B4E9', '^'),
    'SSN': ('#D55E00', 'D'),
    'SSN-radius0': ('#999999', 'v'),
}


class Results:
    """Values of a column by norm and batch, seed by seed.

    Args:
        rows: Of results.csv.
        size: 'cpu' or 'gpu'.
    """

    def __init__(self, rows: Sequence[dict[str, str]], size: str) -> None:
        self.rows = [row for row in rows if row['size'] == size]

    def values(self, column: str, norm: str, batch: int) -> list[float]:
        """In the order of the seeds.

        Args:
            column: Name of the column.
            norm: Name of the norm.
            batch: Images per batch.
        """
        return list(self.by_seed(column, norm, batch).values())

    def by_seed(self, column: str, norm: str, batch: int) -> dict[int, float]:
        """Seed -> value, in order.

        Args:
            column: Name of the column.
            norm: Name of the norm.
            batch: Images per batch.
        """
        found = [r for r in self.rows if r['norm'] == norm and r['batch'] == str(batch)]
        return dict(sorted((int(row['seed']), float(row[column])) for row in found))


def accuracy_table(results: Results, column: str = 'top1', digits: int = 1) -> str:
    """Norms by batch sizes: mean over seeds, smallest and largest.

    Args:
        results: Of one size.
        column: Name of the column.
        digits: Behind the point.
    """
    return markdown(
        ['norm', *(f'{batch} images' for batch in BATCHES), 'seeds'],
        [
            [
                norm,
                *(spread(results.values(column, norm, batch), digits) for batch in BATCHES),
                ' / '.join(str(len(results.values(column, norm, batch))) for batch in BATCHES),
            ]
            for norm in NORMS
        ],
    )


def verdict_table(results: Results) -> str:
    """SSN against each other norm at each batch size, and each norm against its larger batches.

    Args:
        results: Of one size.
    """

    def top1(norm: str, batch: int) -> list[float]:
        return results.values('top1', norm, batch)

    rows = [
        [
            f'SSN against {norm}',
            *(verdict(top1('SSN', batch), top1(norm, batch), MARGIN) for batch in BATCHES),
        ]
        for norm in NORMS
        if norm != 'SSN'
    ]
    rows += [
        [
            f'{norm} against its next larger batch',
            '',
            *(verdict(top1(norm, b), top1(norm, a), MARGIN) for a, b in pairwise(BATCHES)),
        ]
        for norm in NORMS
    ]
    return markdown(['top-1', *(f'{batch} images' for batch in BATCHES)], rows)


def accuracy_figure(results: Results, title: str) -> Figure:
    """Top-1 over images per batch: a line through the means, a mark per seed.

    Args:
        results: Of one size.
        title: Title of the figure.
    """
    figure = new_figure(7.5, 4.2)
    ax = figure.subplots()
    for offset, norm in enumerate(NORMS):
        colour, mark = STYLE[norm]
        points = {i: results.values('top1', norm, batch) for i, batch in enumerate(BATCHES)}
        points = {i + 0.05 * (offset - 2): values for i, values in points.items() if values}
        means = [sum(values) / len(values) for values in points.values()]
        ax.plot(list(points), means, color=colour, linewidth=1.2, alpha=0.8)
        each = [(x, value) for x, values in points.items() for value in values]
        if each:
            ax.scatter(*zip(*each, strict=True), color=colour, marker=mark, s=26, label=norm)
    ax.set_xticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
    ax.set_xlabel('images per batch, learning rate in proportion')
    ax.set_ylabel('top-1 after the last epoch, %')
    ax.grid(axis='y', color='#00000022')
    ax.spines[['top', 'right']].set_visible(False)
    ax.set_title(title, fontsize=10)
    if results.rows:
        ax.legend(frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
    return figure


def report(rows: Sequence[dict[str, str]]) -> str:
    """All tables, size by size.

    Args:
        rows: Of results.csv.
    """
    parts = []
    for size in sorted({row['size'] for row in rows}):
        results = Results(rows, size)
        parts += [
            f'Size `{size}`, top-1 in %, mean (smallest-largest) over seeds:',
            accuracy_table(results),
            'Training loss over the last epoch:',
            accuracy_table(results, 'train_loss', 2),
            'By the rule of the protocol:',
            verdict_table(results),
        ]
    return '\n\n'.join(parts)


def main() -> None:
    """Print the tables, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python -m studies.small_batches.analyze'
    )
    add_analyze_arguments(parser, 'small_batches')
    args = parser.parse_args()
    rows = read(args.results / 'results.csv')
    text = report(rows)
    print(text)
    put_into(args.out / 'README.md', text)
    for size in sorted({row['size'] for row in rows}):
        results = Results(rows, size)
        (epochs,) = {row['epochs'] for row in results.rows}
        title = f'Small batches, size {size}, {epochs} epochs\none mark per seed, line: mean'
        save_both(accuracy_figure(results, title), args.out, f'top1_{size}')


if __name__ == '__main__':
    main()
