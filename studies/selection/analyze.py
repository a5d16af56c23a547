"""Shares of IN, LN and BN by batch size and by depth, and the agreement of choices over seeds."""

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from matplotlib.figure import Figure

from ssn_plugin.analysis.figures import (
    new_figure,
    normalizer_legend,
    normalizer_style,
    save_both,
)
from ssn_plugin.analysis.places import place_of
from studies.ledger import add_analyze_arguments, read
from studies.rules import CANDIDATES
from studies.small_batches.analyze import BATCHES
from studies.tables import markdown, put_into, spread

NORMS = ('SN', 'SSN', 'SSN-radius0')
SHUFFLES = 10000
Choice = dict[str, str]  # a row of selections.csv


class Agreement(NamedTuple):
    """How many choices of two seeds are equal.

    Attributes:
        seeds: The pair.
        equal: Fraction of the choices.
        chance: Mean of that fraction over shuffles.
        bound: Its 95th percentile.
    """

    seeds: tuple[str, str]
    equal: float
    chance: float
    bound: float


def of_run(rows: Sequence[Choice], norm: str, batch: int) -> dict[str, list[Choice]]:
    """Rows of a norm and a batch size by seed.

    Args:
        rows: Of selections.csv.
        norm: 'SN', 'SSN' or 'SSN-radius0'.
        batch: Images per batch.
    """
    found = defaultdict(list)
    for row in rows:
        if row['norm'] == norm and row['batch'] == str(batch):
            found[row['seed']].append(row)
    return dict(sorted(found.items()))


def share(rows: Sequence[Choice], normalizer: str) -> float:
    """Importance ratio averaged over rows.

    Args:
        rows: At least one.
        normalizer: 'IN', 'LN' or 'BN'.
    """
    return sum(float(row[normalizer]) for row in rows) / len(rows)


def share_table(rows: Sequence[Choice]) -> str:
    """Share of each normalizer by norm and batch size, over seeds.

    Args:
        rows: Of selections.csv, of one size.
    """
    lines = []
    for norm in NORMS:
        for batch in BATCHES:
            seeds = of_run(rows, norm, batch).values()
            cells = [spread([share(seed, n) for seed in seeds], 2) for n in CANDIDATES]
            lines.append([norm, str(batch), *cells, str(len(seeds))])
    return markdown(['norm', 'images', *CANDIDATES, 'seeds'], lines)


def depth_table(rows: Sequence[Choice], norm: str = 'SSN') -> str:
    """Share of each normalizer by stage and batch size, all seeds together.

    Args:
        rows: Of selections.csv, of one size.
        norm: 'SN', 'SSN' or 'SSN-radius0'.
    """
    stages = dict.fromkeys(place_of(row['layer']).stage for row in rows)
    lines = []
    for stage in stages:
        cells = []
        for batch in BATCHES:
            seeds = of_run(rows, norm, batch).values()
            own = [r for seed in seeds for r in seed if place_of(r['layer']).stage == stage]
            cells.append(' / '.join(f'{share(own, n):.2f}' for n in CANDIDATES) if own else '')
        lines.append([stage, *cells])
    names = ' / '.join(CANDIDATES)
    return markdown([f'{norm}: {names}', *(f'{batch} images' for batch in BATCHES)], lines)


def chosen(row: Choice) -> str:
    """The normalizer of the largest ratio.

    Args:
        row: Of selections.csv.
    """
    return max(CANDIDATES, key=lambda name: float(row[name]))


def agreements(seeds: dict[str, list[Choice]]) -> list[Agreement]:
    """Agreement of each pair of seeds, with that of shuffled choices.

    Args:
        seeds: Rows of one norm and batch size by seed.
    """
    choices = {
        seed: {(row['layer'], row['statistic']): chosen(row) for row in rows}
        for seed, rows in seeds.items()
    }
    generator = random.Random(0)
    found = []
    for first, second in combinations(choices, 2):
        ours, theirs = choices[first], choices[second]
        places = list(ours)
        equal = sum(ours[place] == theirs[place] for place in places) / len(places)
        by_statistic = defaultdict(list)
        for place in places:
            by_statistic[place[1]].append(place)
        counts = []
        for _ in range(SHUFFLES):
            count = 0
            for own in by_statistic.values():
                shuffled = [theirs[place] for place in own]
                generator.shuffle(shuffled)
                count += sum(map(str.__eq__, (ours[place] for place in own), shuffled))
            counts.append(count / len(places))
        counts.sort()
        bound = counts[int(0.95 * SHUFFLES)]
        found.append(Agreement((first, second), equal, sum(counts) / SHUFFLES, bound))
    return found


def agreement_table(rows: Sequence[Choice], norm: str = 'SSN') -> str:
    """Agreement of each pair of seeds at each batch size.

    Args:
        rows: Of selections.csv, of one size.
        norm: 'SN', 'SSN' or 'SSN-radius0'.
    """
    lines = [
        [
            str(batch),
            ' and '.join(pair.seeds),
            f'{pair.equal:.2f}',
            f'{pair.chance:.2f}',
            f'{pair.bound:.2f}',
            'above' if pair.equal > pair.bound else 'not above',
        ]
        for batch in BATCHES
        for pair in agreements(of_run(rows, norm, batch))
    ]
    head = ['images', 'seeds', 'equal choices', 'by chance', '95 % of chance below', 'agreement']
    return markdown(head, lines) if lines else 'Agreement over seeds: not yet run.'


def share_figure(rows: Sequence[Choice], title: str) -> Figure:
    """Stacked bars of the shares: norms side by side, a bar per batch size.

    Args:
        rows: Of selections.csv, of one size.
        title: Title of the figure.
    """
    figure = new_figure(8.5, 3.4)
    for ax, norm in zip(figure.subplots(1, len(NORMS), sharey=True), NORMS, strict=True):
        for position, batch in enumerate(BATCHES):
            own = [row for seed in of_run(rows, norm, batch).values() for row in seed]
            bottom = 0.0
            for name in CANDIDATES if own else ():
                height = share(own, name)
                ax.bar(position, height, 0.7, bottom, **normalizer_style(name))
                if height > 0.08:
                    ax.annotate(
                        f'{height:.2f}',
                        (position, bottom + height / 2),
                        ha='center',
                        va='center',
                        fontsize=8,
                        bbox=dict(boxstyle='round,pad=0.15', facecolor='white', linewidth=0),
                    )
                bottom += height
            if not own:
                ax.annotate('not yet\nrun', (position, 0.5), ha='center', va='center', fontsize=8)
        ax.set_xticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
        ax.set_xlim(-0.5, len(BATCHES) - 0.5)
        ax.set_ylim(0, 1)
        ax.set_xlabel('images per batch')
        ax.set_title(norm, fontsize=10)
        ax.spines[['top', 'right']].set_visible(False)
    figure.get_axes()[0].set_ylabel('share over layers and statistics')
    normalizer_legend(figure, CANDIDATES)
    figure.suptitle(title, fontsize=10)
    return figure


def report(rows: Sequence[Choice]) -> str:
    """All tables, size by size.

    Args:
        rows: Of selections.csv.
    """
    parts = []
    for size in sorted({row['size'] for row in rows}):
        own = [row for row in rows if row['size'] == size]
        parts += [
            f'Size `{size}`, shares, mean (smallest-largest) over seeds:',
            share_table(own),
            'Shares of IN / LN / BN by depth, all seeds together:',
            depth_table(own),
            'Choices of two seeds that are equal:',
            agreement_table(own),
        ]
    return '\n\n'.join(parts)


def main() -> None:
    """Print the tables, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python -m studies.selection.analyze'
    )
    add_analyze_arguments(parser, 'selection', 'small_batches', 'selections.csv')
    args = parser.parse_args()
    rows = read(args.results / 'selections.csv')
    text = report(rows)
    print(text)
    put_into(args.out / 'README.md', text)
    for size in sorted({row['size'] for row in rows}):
        own = [row for row in rows if row['size'] == size]
        seeds = ', '.join(sorted({row['seed'] for row in own}))
        title = f'What is chosen, size {size}, seeds {seeds} together'
        save_both(share_figure(own, title), args.out, f'shares_{size}')


if __name__ == '__main__':
    main()
