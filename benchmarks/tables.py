"""The tables of README.md from results/*.csv.

python benchmarks/tables.py          # print them
python benchmarks/tables.py --write  # put them into README.md
"""

import argparse
import csv
import re
from collections.abc import Callable
from pathlib import Path

from layer import geometric_mean
from records import RESULTS

README = Path(__file__).parent / 'README.md'
LAYERS = (
    'SSN undecided',
    'SSN all BN',
    'SSN all LN',
    'SSN all IN',
    'SSN LN/BN',
    'SN',
    'GroupNorm(32)',
    'InstanceNorm2d',
    'straightforward SSN',
)


def rows_of(name: str) -> list[dict[str, str]]:
    """Rows of results/NAME.csv; none if it was not measured.

    Args:
        name: Name of the file without its suffix.
    """
    path = RESULTS / f'{name}.csv'
    if not path.is_file():
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def origin(rows: list[dict[str, str]]) -> str:
    """Device, versions, date and commit of rows, in a sentence.

    Args:
        rows: At least one.
    """
    row = rows[0]
    return f'{row["device"]}, torch {row["torch"]}, {row["date"]}, commit {row["commit"]}.'


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table.

    Args:
        head: Titles of the columns.
        lines: Cells, a list per line.
    """
    rows = [head, ['---'] * len(head), *lines]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def layer_table(rows: list[dict[str, str]]) -> str:
    """Forward + backward as ratios to BatchNorm2d: one line per shape, then mean and largest.

    Args:
        rows: Of layer_DEVICE_DTYPE.csv.
    """
    both = [row for row in rows if row['mode'] == 'both']
    cells = {(row['where'], row['layer']): row for row in both}
    places = list(dict.fromkeys(row['where'] for row in both))
    lines = []
    for place in places:
        base = cells[place, 'BatchNorm2d']
        ratios = [cells.get((place, layer)) for layer in LAYERS]
        texts = [f'{float(row["ratio"]):.2f}' if row else '-' for row in ratios]
        lines.append([place, base['shape'], f'{float(base["ms"]):.2f}', *texts])
    columns = [
        [float(cells[place, layer]['ratio']) for place in places if (place, layer) in cells]
        for layer in LAYERS
    ]
    for title, pick in (('geometric mean', geometric_mean), ('largest', max)):
        lines.append([title, '', '', *(f'{pick(column):.2f}' for column in columns)])
    return markdown(['place', 'shape', 'BatchNorm2d, ms', *LAYERS], lines)


def step_table(rows: list[dict[str, str]]) -> str:
    """Whole training steps.

    Args:
        rows: Of training_step_DEVICE.csv.
    """
    lines = [
        [
            row['network'],
            row['images'],
            row['norm'],
            f'{float(row["s"]):.2f}',
            f'{float(row["ratio"]):.3f}',
            f'{float(row["ratio_p20"]):.3f} to {float(row["ratio_p80"]):.3f}',
            row['rounds'],
        ]
        for row in rows
    ]
    head = ['network', 'images', 'norm', 's', 'ratio to BN', 'p20 to p80', 'rounds']
    return markdown(head, lines)


def deployment_table(rows: list[dict[str, str]]) -> str:
    """Inference before and after collapsing and folding.

    Args:
        rows: Of deployment_DEVICE.csv.
    """
    lines = [
        [
            row['network'],
            row['selection'],
            row['form'],
            f'{float(row["s"]):.3f}',
            *(
                f'{float(row[key]):.3f} ({float(row[f"{key}_p20"]):.3f} to '
                f'{float(row[f"{key}_p80"]):.3f})'
                for key in ('ratio', 'to_undecided')
            ),
            row['rounds'],
        ]
        for row in rows
    ]
    head = ['network', 'selection', 'form', 's', 'ratio to folded BN', 'ratio to undecided SSN']
    return markdown([*head, 'rounds'], lines)


def sparsestmax_table(rows: list[dict[str, str]]) -> str:
    """SparsestMax alone.

    Args:
        rows: Of sparsestmax_DEVICE.csv.
    """
    lines = [[row['shape'], row['function'], row['mode'], row['us']] for row in rows]
    return markdown(['shape', 'function', 'pass', 'us'], lines)


def tables() -> str:
    """All that was measured."""
    parts = []
    for title, name, table in (
        ('Layer, CPU, float32', 'layer_cpu_float32', layer_table),
        ('Layer, GPU, float32', 'layer_cuda_float32', layer_table),
        ('Layer, GPU, bfloat16', 'layer_cuda_bfloat16', layer_table),
        ('Training step, CPU', 'training_step_cpu', step_table),
        ('Training step, GPU', 'training_step_cuda', step_table),
        ('Deployment, CPU', 'deployment_cpu', deployment_table),
        ('Deployment, GPU', 'deployment_cuda', deployment_table),
        ('SparsestMax, CPU', 'sparsestmax_cpu', sparsestmax_table),
        ('SparsestMax, GPU', 'sparsestmax_cuda', sparsestmax_table),
    ):
        rows = rows_of(name)
        body = f'{origin(rows)}\n\n{table(rows)}' if rows else '**Not measured.**'
        parts.append(f'### {title}\n\n{body}\n')
    return '\n'.join(parts)


def between_marks(text: str, name: str, content: str) -> str:
    """A page with other content between its marks ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Args:
        text: The page.
        name: NAME.
        content: What to put there; the marks stand on lines of their own.
    """
    return re.sub(
        rf'(<!-- {name} -->\n).*(\n<!-- end of {name} -->)',
        lambda found: f'{found[1]}{content}{found[2]}',
        text,
        flags=re.DOTALL,
    )


def with_tables(text: str) -> str:
    """README.md with the tables of today between its two marks.

    Args:
        text: README.md.
    """
    return between_marks(text, 'tables', tables().removesuffix('\n'))


def print_or_write(about: str, page: Path, content: Callable, changed: Callable) -> None:
    """Print, or with ``--write`` put into a page.

    Args:
        about: What ``--help`` says.
        page: The page.
        content: Makes what is printed.
        changed: Makes of the page's text that with the content.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--write', action='store_true', help=f'put it into {page.name}')
    if parser.parse_args().write:
        page.write_text(changed(page.read_text()))
    else:
        print(content())


if __name__ == '__main__':
    print_or_write(__doc__, README, tables, with_tables)
