"""The tables of results.csv beside the rows of small_batches and transfer, verdicts, the figure."""

import argparse
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.figure import Figure

from ssn_plugin.analysis.figures import new_figure, save_both
from studies.defaults.recipe import (
    BATCHES,
    CONFIRMATION,
    FEW_VALUES_CELLS,
    FRESH,
    LATER_CELL,
    LATER_RULES,
    LEVER_RULES,
    LIVE,
    LR_FACTORS,
    NORMS,
    PUBLISHED,
    RELEASED,
    RULES,
    SCORES,
    SCREENING,
    SCREENING_CELLS,
    SHIPPED,
    all_done,
    best_rate,
    possible,
    rates,
    run_of,
    score,
    winner,
)
from studies.ledger import ROOT, add_analyze_arguments, matches, read
from studies.small_batches import analyze as small_batches
from studies.small_batches.analyze import STYLE
from studies.tables import markdown, put_into, spread, verdict
from studies.transfer import analyze as transfer
from studies.transfer.analyze import images

MARGINS = {'cls': small_batches.MARGIN, 'seg': transfer.MARGIN, 'det': transfer.MARGIN}
NAMES = {'cls': 'Classification, top-1', 'seg': 'DeepLabV3+, mIoU', 'det': 'Mask R-CNN, box AP50'}
PAPER = 'SSN'  # as small_batches and transfer ran it
RowText = Mapping[str, str]


def published(small: Sequence[RowText], transferred: Sequence[RowText]) -> Iterator[RowText]:
    """The rows of the other studies, in the fields of this one.

    Args:
        small: Of the results.csv of small_batches.
        transferred: Of that of transfer.
    """
    for row in small:
        yield {**row, 'task': 'cls', 'rule': row['norm']}
    for row in transferred:
        if row['data'] == 'demo':
            yield {**row, 'rule': row['norm']}


class Confirmed:
    """Scores at the recipe's learning rate, without those of the screening.

    Args:
        rows: Of results.csv, of one size.
        others: As ``published`` makes them, of that size.
    """

    def __init__(self, rows: Sequence[RowText], others: Sequence[RowText]) -> None:
        seeds = [str(seed) for seed in SCREENING]
        own = [
            {**row, 'rule': _label(row['rule'], row['backbone'])}
            for row in rows
            if row['seed'] not in seeds
            and float(row['lr_factor']) == LR_FACTORS[0]
            # Run again as backbones; the published row counts.
            and not (row['rule'] in NORMS and int(row['seed']) in PUBLISHED[row['task']])
        ]
        self.rows = [*own, *others]

    def values(self, name: str, task: str, batch: int, column: str = '') -> list[float]:
        """In the order of the seeds.

        Args:
            name: A norm, or a rule and its backbone.
            task: 'cls', 'seg' or 'det'.
            batch: Images per batch.
            column: The score of the task unless given.
        """
        key = {'rule': name, 'task': task, 'batch': batch}
        found = sorted((r for r in self.rows if matches(r, key)), key=lambda r: int(r['seed']))
        return [float(row[column or SCORES[task]]) for row in found]


def ours(found: Confirmed, best: str, task: str, batch: int, column: str = '') -> list[float]:
    """Scores of SSN as the configs have it: the winner, with '+few' where that changes it.

    Args:
        found: The rows.
        best: The winner of the screening.
        task: 'cls', 'seg' or 'det'.
        batch: Images per batch.
        column: The score of the task unless given.
    """
    return found.values(_ours(best, (task, batch)), task, batch, column)


def _ours(best: str, cell: tuple[str, int]) -> str:
    return SHIPPED if best == RULES[0] and cell in FEW_VALUES_CELLS else best


def _label(rule: str, backbone: str) -> str:
    return f'{rule}, {backbone}' if backbone in (LIVE, RELEASED) else rule


def screening_table(size: str, rows: Sequence[RowText]) -> str:
    """Rules by cells of the screening.

    Args:
        size: 'cpu' or 'gpu'.
        rows: Of results.csv.
    """
    lines = []
    for rule in (*RULES, *LEVER_RULES, *LATER_RULES):
        runs = [run_of(size, rule, cell, SCREENING[0]) for cell in SCREENING_CELLS]
        later = run_of(size, rule, LATER_CELL, SCREENING[0])
        cells = [_score(run, rows) for run in (*runs, later)]
        mean = '-'
        if all_done(runs, rows):
            mean = f'{sum(score(run, rows) for run in runs) / len(runs):.1f}'
        lines.append([rule, *cells[:-1], mean, cells[-1]])
    head = [f'{task}, {images(batch)}' for task, batch in SCREENING_CELLS]
    return markdown(['rule', *head, 'mean', 'cls, 2 images'], lines)


def _score(run: Mapping[str, object], rows: Sequence[RowText]) -> str:
    return f'{score(run, rows):.1f}' if all_done([run], rows) else '-'


def score_table(found: Confirmed, best: str, task: str, column: str = '', digits: int = 1) -> str:
    """Rule and norms by batch sizes: mean over seeds, smallest and largest.

    Args:
        found: The rows.
        best: The winner of the screening.
        task: 'cls', 'seg' or 'det'.
        column: The score of the task unless given.
        digits: Behind the point.
    """
    names = [best, PAPER, *NORMS]
    if task != 'cls':
        names[1:1] = [_label(best, RELEASED), _label(best, LIVE)]
    if any(_ours(best, (task, batch)) == SHIPPED for batch in BATCHES[task]):
        names.insert(1, SHIPPED)
    lines = []
    for name in names:
        cells, counts = [], []
        for batch in BATCHES[task]:
            if name == SHIPPED and _ours(best, (task, batch)) == best:
                cells.append('as above')
                counts.append('-')
                continue
            values = found.values(name, task, batch, column)
            cells.append(
                spread(values, digits) if possible(name, (task, batch)) else 'refused by torch'
            )
            counts.append(str(len(values)))
        shown = f'{PAPER} as it was' if name == PAPER else name
        lines.append([shown, *cells, ' / '.join(counts)])
    return markdown(['', *map(images, BATCHES[task]), 'seeds'], lines)


def verdict_table(found: Confirmed, best: str) -> str:
    """The shipped rule against each norm and the second best; whether it is nowhere lower.

    Args:
        found: The rows.
        best: The winner of the screening.
    """
    lines = []
    for task, batches in BATCHES.items():
        for batch in batches:
            scores = ours(found, best, task, batch)
            judged = [
                verdict(scores, found.values(norm, task, batch), MARGINS[task])
                if possible(norm, (task, batch))
                else 'not comparable'
                for norm in (*NORMS, PAPER)
            ]
            norms = [found.values(n, task, batch) for n in NORMS]
            second = _against_second(scores, norms, task)
            lines.append(
                [f'{task}, {images(batch)}', *judged, second, _target(judged[: len(NORMS)])]
            )
    return markdown(['', *NORMS, f'{PAPER} as it was', 'second best norm', 'target'], lines)


def _against_second(scores: Sequence[float], norms: Sequence[Sequence[float]], task: str) -> str:
    means = sorted(
        (sum(values) / len(values), index) for index, values in enumerate(norms) if values
    )
    return verdict(scores, norms[means[-2][1]] if len(means) > 1 else [], MARGINS[task])


def _target(judged: Sequence[str]) -> str:
    if 'lower' in judged:
        return 'missed'
    return 'open' if {'not yet run', 'one seed'} & set(judged) else 'met'


def rate_table(size: str, best: str, rows: Sequence[RowText]) -> str:
    """Scores of the screening's seed at every learning rate.

    Args:
        size: 'cpu' or 'gpu'.
        best: The winner of the screening.
        rows: Of results.csv.
    """
    lines = []
    for task, batches in BATCHES.items():
        for batch in batches:
            for name in dict.fromkeys((best, _ours(best, (task, batch)), *RULES, *NORMS)):
                if possible(name, (task, batch)):
                    runs = rates(size, name, (task, batch))
                    if any(all_done([run], rows) for run in runs[1:]):
                        cells = [_score(run, rows) for run in runs]
                        lines.append([f'{task}, {images(batch)}', name, *cells])
    return markdown(['', '', *(f'x {factor:g}' for factor in LR_FACTORS)], lines)


def best_rate_table(size: str, best: str, rows: Sequence[RowText], found: Confirmed) -> str:
    """Rule and norms, each at its best learning rate: seeds of the confirmation, verdicts.

    Args:
        size: 'cpu' or 'gpu'.
        best: The winner of the screening.
        rows: Of results.csv.
        found: The rows at the recipe's rate.
    """
    lines = []
    for task, batches in BATCHES.items():
        for batch in batches:
            cell = (task, batch)
            shown, scores = [], {}
            for name in (_ours(best, cell), *NORMS):
                factor = best_rate(size, name, cell, rows)
                values = _values_at(factor, size, name, cell, rows, found)
                text = 'not yet run' if factor is None else f'x {factor:g}: {spread(values)}'
                shown.append(text if possible(name, cell) else 'refused by torch')
                if possible(name, cell):
                    scores[name] = values
            mine = scores.pop(_ours(best, cell))
            judged = [verdict(mine, theirs, MARGINS[task]) for theirs in scores.values()]
            second = _against_second(mine, list(scores.values()), task)
            lines.append([f'{task}, {images(batch)}', *shown, second, _target(judged)])
    return markdown(['', 'SSN as shipped', *NORMS, 'second best norm', 'target'], lines)


def _values_at(
    factor: float | None,
    size: str,
    name: str,
    cell: tuple[str, int],
    rows: Sequence[RowText],
    found: Confirmed,
) -> list[float]:
    if factor is None:
        return []
    if factor == LR_FACTORS[0]:
        return found.values(name, *cell)
    seeds = (*CONFIRMATION, *FRESH)
    runs = [run_of(size, name, cell, seed, lr_factor=factor) for seed in seeds]
    return [score(run, rows) for run in runs if all_done([run], rows)]


def report(
    rows: Sequence[RowText], small: Sequence[RowText], transferred: Sequence[RowText]
) -> str:
    """All tables, size by size.

    Args:
        rows: Of results.csv.
        small: Of the results.csv of small_batches.
        transferred: Of that of transfer.
    """
    parts = []
    for size in sorted({row['size'] for row in rows}):
        own = [row for row in rows if row['size'] == size]
        others = [row for row in published(small, transferred) if row['size'] == size]
        parts += [f'Size `{size}`, in %. Screening, seed 10:', screening_table(size, own)]
        best, found = best_so_far(size, own), Confirmed(own, others)
        standing = (
            '' if _is_screened(size, own) else ', the first rule: its screening has not ended'
        )
        parts.append(f'Confirmation of `{best}`{standing}. Mean (smallest-largest) over seeds.')
        for task, name in NAMES.items():
            parts += [f'{name}:', score_table(found, best, task)]
            parts += ['Training loss:', score_table(found, best, task, 'train_loss', 2)]
        parts += ['By the rule of the protocol, as shipped:', verdict_table(found, best)]
        if any(float(row['lr_factor']) != 1 for row in own):
            parts += ['Learning rates, seed 10:', rate_table(size, best, own)]
            table = best_rate_table(size, best, own, found)
            parts += ['Each at its best learning rate, other seeds:', table]
    return '\n\n'.join(parts) or 'Not yet run.'


def best_so_far(size: str, rows: Sequence[RowText]) -> str:
    """The winner of the screening; the first rule until it has been run."""
    return winner(size, rows) if _is_screened(size, rows) else RULES[0]


def _is_screened(size: str, rows: Sequence[RowText]) -> bool:
    runs = [run_of(size, r, cell, SCREENING[0]) for r in RULES for cell in SCREENING_CELLS]
    return all_done(runs, rows)


def scores_figure(found: Confirmed, best: str, title: str) -> Figure:
    """Score over images per batch, a panel per task.

    Args:
        found: The rows.
        best: The winner of the screening.
        title: Title of the figure.
    """
    styles = {best: ('#000000', '*'), **{name: STYLE[name] for name in (PAPER, *NORMS)}}
    figure = new_figure(11, 3.6)
    for ax, (task, batches) in zip(figure.subplots(1, len(BATCHES)), BATCHES.items(), strict=True):
        for offset, (name, (colour, mark)) in enumerate(styles.items()):
            points = {
                place + 0.06 * (offset - 2): ours(found, best, task, batch)
                if name == best
                else found.values(name, task, batch)
                for place, batch in enumerate(batches)
            }
            points = {x: values for x, values in points.items() if values}
            means = [sum(values) / len(values) for values in points.values()]
            ax.plot(list(points), means, color=colour, linewidth=1.2, alpha=0.8)
            each = [(x, value) for x, values in points.items() for value in values]
            x, y = zip(*each, strict=True) if each else ([], [])
            shown = f'{PAPER} as it was' if name == PAPER else name
            ax.scatter(x, y, color=colour, marker=mark, s=30, label=shown)
        ax.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        ax.set_ylim(bottom=0)
        ax.set_xlabel('images per batch')
        ax.set_title(f'{NAMES[task]}, %', fontsize=10)
        ax.grid(axis='y', color='#00000022')
        ax.spines[['top', 'right']].set_visible(False)
    handles, labels = figure.get_axes()[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside right center', frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    """Print the tables, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python -m studies.defaults.analyze'
    )
    add_analyze_arguments(parser, 'defaults')
    args = parser.parse_args()
    rows = read(args.results / 'results.csv')
    small, transferred = (
        read(ROOT / 'studies' / study / 'results.csv') for study in ('small_batches', 'transfer')
    )
    text = report(rows, small, transferred)
    print(text)
    put_into(args.out / 'README.md', text)
    for size in sorted({row['size'] for row in rows}):
        own = [row for row in rows if row['size'] == size]
        others = [row for row in published(small, transferred) if row['size'] == size]
        best, found = best_so_far(size, own), Confirmed(own, others)
        title = (
            f'The rule {best} as shipped and fixed norms, size {size}: a mark per run, line: mean'
        )
        save_both(scores_figure(found, best, title), args.out, f'scores_{size}')


if __name__ == '__main__':
    main()
