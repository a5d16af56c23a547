"""The tables of results.csv, what differs by the rule of the protocol, and the figure."""

import argparse
from collections.abc import Sequence

from matplotlib.figure import Figure

from ssn_plugin.analysis.figures import new_figure, save_both
from studies.ledger import add_analyze_arguments, read
from studies.small_batches.analyze import STYLE
from studies.tables import markdown, put_into, spread, verdict
from studies.transfer.recipe import BATCHES, IMPOSSIBLE, NORMS, TASKS

MARGIN = 5.0  # percentage points, see README.md
FLOOR = 5.0  # below it in all runs, a comparison says nothing
SCORES = {'det': ('box_ap50', 'box AP50'), 'seg': ('miou', 'mIoU')}
ALL_SCORES = {
    'det': (('box_ap50', 'box AP50'), ('mask_ap50', 'mask AP50')),
    'seg': (('miou', 'mIoU'), ('pixel_accuracy', 'pixel accuracy')),
}
NETWORKS = {'det': 'Mask R-CNN', 'seg': 'DeepLabV3+'}
COMPARISONS = [(name, task) for name, tasks in TASKS.items() for task in tasks]


class Comparison:
    """The runs of one data set and task.

    Args:
        rows: Of results.csv, of one size.
        data: 'demo', 'cityscapes' or 'coco'.
        task: 'det' or 'seg'.
    """

    def __init__(self, rows: Sequence[dict[str, str]], data: str, task: str) -> None:
        self.rows = [row for row in rows if row['data'] == data and row['task'] == task]
        self.data, self.task = data, task

    def values(self, column: str, norm: str, batch: int) -> list[float]:
        """In the order of the seeds.

        Args:
            column: Name of the column.
            norm: Name of the norm.
            batch: Images per batch.
        """
        found = [r for r in self.rows if r['norm'] == norm and r['batch'] == str(batch)]
        return [float(row[column]) for row in sorted(found, key=lambda row: int(row['seed']))]

    def scores(self, norm: str, batch: int) -> list[float]:
        """Box AP50 or mIoU in the order of the seeds.

        Args:
            norm: Name of the norm.
            batch: Images per batch.
        """
        return self.values(SCORES[self.task][0], norm, batch)

    def cell(self, column: str, norm: str, batch: int, digits: int = 1) -> str:
        """Mean over seeds, smallest and largest.

        Args:
            column: Name of the column.
            norm: Name of the norm.
            batch: Images per batch.
            digits: Behind the point.
        """
        if (self.task, norm, batch) == IMPOSSIBLE:
            return 'refused by torch'
        return spread(self.values(column, norm, batch), digits)

    @property
    def learned(self) -> bool:
        """Whether a run got above the floor."""
        return any(max(self.scores(n, b), default=0) > FLOOR for n in NORMS for b in BATCHES)


def score_table(comparison: Comparison, column: str, digits: int = 1) -> str:
    """Norms by batch sizes: mean over seeds, smallest and largest.

    Args:
        comparison: One data set and task.
        column: Name of the column.
        digits: Behind the point.
    """
    lines = []
    for norm in NORMS:
        cells = [comparison.cell(column, norm, batch, digits) for batch in BATCHES]
        counts = [str(len(comparison.values(column, norm, batch))) for batch in BATCHES]
        lines.append([norm, *cells, ' / '.join(counts)])
    return markdown(['norm', *map(images, BATCHES), 'seeds'], lines)


def verdict_table(comparison: Comparison) -> str:
    """SSN against each other norm at each batch size.

    Args:
        comparison: One data set and task.
    """
    lines = []
    for norm in NORMS:
        if norm == 'SSN':
            continue
        found = [
            'not comparable'
            if (comparison.task, norm, batch) == IMPOSSIBLE
            else verdict(comparison.scores('SSN', batch), comparison.scores(norm, batch), MARGIN)
            for batch in BATCHES
        ]
        lines.append([f'SSN against {norm}', *found])
    name = SCORES[comparison.task][1]
    return markdown([name, *map(images, BATCHES)], lines)


def images(batch: int) -> str:
    """Head of a column.

    Args:
        batch: Images per batch.
    """
    return f'{batch} image{"s" * (batch > 1)}'


def report(rows: Sequence[dict[str, str]]) -> str:
    """All tables, size by size.

    Args:
        rows: Of results.csv.
    """
    parts = []
    for size in sorted({row['size'] for row in rows}):
        parts.append(f'Size `{size}`, in %, mean (smallest-largest) over seeds.')
        own = [row for row in rows if row['size'] == size]
        for data, task in COMPARISONS:
            parts += _tables(Comparison(own, data, task))
    return '\n\n'.join(parts) or 'Not yet run.'


def _tables(comparison: Comparison) -> list[str]:
    name = f'`{comparison.data}`, {NETWORKS[comparison.task]}'
    if not comparison.rows:
        return [f'{name}: not yet run.']
    parts = []
    for column, score in ALL_SCORES[comparison.task]:
        parts += [f'{name}, {score}:', score_table(comparison, column)]
    parts += [f'{name}, training loss at the end:', score_table(comparison, 'train_loss', 2)]
    if comparison.learned:
        return [*parts, 'By the rule of the protocol:', verdict_table(comparison)]
    return [*parts, f'No run got above {FLOOR:.0f} %, so this says nothing about norms.']


def transfer_figure(rows: Sequence[dict[str, str]], title: str) -> Figure:
    """Score over images per batch, a panel per data set and task.

    Args:
        rows: Of results.csv, of one size.
        title: Title of the figure.
    """
    figure = new_figure(11, 3.6)
    for ax, (data, task) in zip(figure.subplots(1, len(COMPARISONS)), COMPARISONS, strict=True):
        comparison = Comparison(rows, data, task)
        for offset, norm in enumerate(NORMS):
            colour, mark = STYLE[norm]
            points = {
                position + 0.06 * (offset - 1.5): comparison.scores(norm, batch)
                for position, batch in enumerate(BATCHES)
            }
            points = {x: values for x, values in points.items() if values}
            means = [sum(values) / len(values) for values in points.values()]
            ax.plot(list(points), means, color=colour, linewidth=1.2, alpha=0.8)
            each = [(x, value) for x, values in points.items() for value in values]
            x, y = zip(*each, strict=True) if each else ([], [])
            ax.scatter(x, y, color=colour, marker=mark, s=26, label=norm)
        ax.set_xticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
        ax.set_xlim(-0.4, len(BATCHES) - 0.6)
        ax.set_ylim(bottom=0)
        if not comparison.rows:
            ax.set_ylim(0, 1)
            ax.set_yticks([])
            ax.annotate('not yet run', (1, 0.5), ha='center', va='center', fontsize=9)
        ax.set_xlabel('images per batch')
        ax.set_title(f'{data}: {SCORES[task][1]}, %', fontsize=10)
        ax.grid(axis='y', color='#00000022')
        ax.spines[['top', 'right']].set_visible(False)
    handles, labels = figure.get_axes()[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside right center', frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    """Print the tables, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python -m studies.transfer.analyze'
    )
    add_analyze_arguments(parser, 'transfer')
    args = parser.parse_args()
    rows = read(args.results / 'results.csv')
    text = report(rows)
    print(text)
    put_into(args.out / 'README.md', text)
    for size in sorted({row['size'] for row in rows}):
        own = [row for row in rows if row['size'] == size]
        seeds = ', '.join(sorted({row['seed'] for row in own}))
        title = (
            f'Fine-tuned at small batches, size {size}, seeds {seeds}: a mark per run, line: mean'
        )
        save_both(transfer_figure(own, title), args.out, f'scores_{size}')


if __name__ == '__main__':
    main()
