"""SSN against SN and against a radius of 0, and each SSN against itself collapsed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ssn_plugin.analysis.figures import new_figure, save_both
from studies.ledger import ROOT, add_analyze_arguments, read
from studies.small_batches.analyze import BATCHES, MARGIN, STYLE, Results
from studies.tables import markdown, put_into, spread, verdict

OTHERS = ('SN', 'SSN-radius0')
EXACT = 1e-5  # see README.md


def training_table(results: Results) -> str:
    """SSN minus SN, and minus SSN of radius 0, seed by seed, with the verdict.

    Args:
        results: Of the study on small batches, of one size.
    """
    lines = []
    for other in OTHERS:
        for batch in BATCHES:
            ours, theirs = (results.values('top1', norm, batch) for norm in ('SSN', other))
            lines.append(
                [
                    other,
                    str(batch),
                    spread(ours),
                    spread(theirs),
                    ', '.join(f'{d:+.1f}' for d in differences(results, other, batch)),
                    verdict(ours, theirs, MARGIN),
                ]
            )
    head = ['against', 'images', 'SSN', 'the other', 'difference by seed', 'SSN is']
    return markdown(head, lines)


def differences(results: Results, other: str, batch: int) -> list[float]:
    """Top-1, SSN minus the other, of each seed that both have run.

    Args:
        results: Of the study on small batches, of one size.
        other: Name of the other norm.
        batch: Images per batch.
    """
    ours, theirs = (results.by_seed('top1', norm, batch) for norm in ('SSN', other))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def collapse_table(rows: Sequence[dict[str, str]]) -> str:
    """Each evaluated checkpoint.

    Args:
        rows: Of results.csv, of one size.
    """
    lines = [
        [
            row['batch'],
            row['seed'],
            f'{float(row["top1"]):.1f}',
            f'{float(row["top1_collapsed"]):.1f}',
            row['relative_difference'],
            f'{row["other_classes"]} of {row["images"]}',
            'exact' if float(row['relative_difference']) < EXACT else 'not exact',
        ]
        for row in sorted(rows, key=lambda row: (-int(row['batch']), int(row['seed'])))
    ]
    head = [
        'images',
        'seed',
        'as trained',
        'collapsed',
        'relative difference of logits',
        'other class',
        'collapsing is',
    ]
    return markdown(head, lines) if lines else 'Collapsed: not yet run.'


def sparsity_figure(results: Results, title: str) -> Figure:
    """Difference in top-1, SSN minus the other, a mark per seed.

    Args:
        results: Of the study on small batches, of one size.
        title: Title of the figure.
    """
    figure = new_figure(7, 3.6)
    ax = figure.subplots()
    ax.axhspan(-MARGIN, MARGIN, color='#00000012', linewidth=0)
    ax.axhline(0, color='#00000088', linewidth=0.8)
    for offset, other in zip((-0.1, 0.1), OTHERS, strict=True):
        colour, mark = STYLE[other]
        points = [
            (position + offset, difference)
            for position, batch in enumerate(BATCHES)
            for difference in differences(results, other, batch)
        ]
        if points:
            x, y = zip(*points, strict=True)
            ax.scatter(x, y, color=colour, marker=mark, s=30, label=f'SSN minus {other}')
    ax.set_xlim(-0.5, len(BATCHES) - 0.5)
    ax.set_xticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
    ax.set_xlabel('images per batch')
    ax.set_ylabel('difference in top-1, points')
    ax.spines[['top', 'right']].set_visible(False)
    if results.rows:
        ax.legend(frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
    ax.set_title(title, fontsize=10)
    return figure


def report(rows: Sequence[dict[str, str]], trained: Sequence[dict[str, str]]) -> str:
    """All tables, size by size.

    Args:
        rows: Of results.csv.
        trained: Of the results.csv of the study on small batches.
    """
    parts = []
    for size in sorted({row['size'] for row in trained}):
        parts += [
            f'Size `{size}`, top-1 in %, mean (smallest-largest) over seeds:',
            training_table(Results(trained, size)),
            'As trained and collapsed:',
            collapse_table([row for row in rows if row['size'] == size]),
        ]
    return '\n\n'.join(parts)


def main() -> None:
    """Print the tables, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python -m studies.sparsity.analyze'
    )
    add_analyze_arguments(parser, 'sparsity')
    parser.add_argument(
        '--trained-results',
        type=Path,
        default=ROOT / 'studies' / 'small_batches',
        help='folder of the results.csv of small_batches (default: %(default)s)',
    )
    args = parser.parse_args()
    rows, trained = read(args.results / 'results.csv'), read(args.trained_results / 'results.csv')
    text = report(rows, trained)
    print(text)
    put_into(args.out / 'README.md', text)
    for size in sorted({row['size'] for row in trained}):
        results = Results(trained, size)
        title = (
            f'SSN minus what stays mixed, size {size}\n'
            'one mark per seed; no difference unless the mean leaves the grey'
        )
        save_both(sparsity_figure(results, title), args.out, f'difference_{size}')


if __name__ == '__main__':
    main()
