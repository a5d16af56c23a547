"""How the studies show repeated runs: mean and spread over seeds, tables, a verdict."""

from collections.abc import Sequence
from pathlib import Path

from ssn_plugin.checkpoint.whole_file import whole_file

BEGIN, END = '<!-- tables of analyze.py: begin -->', '<!-- end -->'


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean of some runs, and their smallest and largest value where there are several.

    Args:
        values: One per seed; none where nothing has been run.
        digits: Behind the point.

    Example:
        >>> from studies.tables import spread
        >>> spread([30.0, 31.0]), spread([30.0]), spread([])
        ('30.5 (30.0-31.0)', '30.0', 'not yet run')
    """
    if not values:
        return 'not yet run'
    mean = f'{sum(values) / len(values):.{digits}f}'
    if len(values) == 1:
        return mean
    return f'{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})'


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        head: Names of the columns.
        rows: Cells.
    """
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def verdict(ours: Sequence[float], theirs: Sequence[float], margin: float) -> str:
    """Whether a difference of two settings counts as seen, by the rule of the protocols.

    Args:
        ours: One value per seed.
        theirs: One value per seed.
        margin: What the difference of the means has to exceed.

    Returns:
        'higher' or 'lower' if all of ours are above or below all of theirs by such a mean
        difference, 'no difference seen' otherwise, 'not yet run' without values, and
        'one seed' where one side has a single one.

    Example:
        >>> from studies.tables import verdict
        >>> verdict([30, 31], [20, 22], 3.0), verdict([30, 31], [29, 27], 3.0)
        ('higher', 'no difference seen')
    """
    if not ours or not theirs:
        return 'not yet run'
    if min(len(ours), len(theirs)) == 1:
        return 'one seed'
    difference = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    if abs(difference) > margin and min(ours) > max(theirs):
        return 'higher'
    if abs(difference) > margin and max(ours) < min(theirs):
        return 'lower'
    return 'no difference seen'


def put_into(page: Path, tables: str) -> None:
    """Put the tables of a study between the marks of its page, which is left alone without them.

    Args:
        page: A README.md; a missing one is not made.
        tables: In Markdown.
    """
    if not page.is_file():
        return
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        with whole_file(page) as temporary:
            temporary.write_text(f'{before}{BEGIN}\n\n{tables}\n\n{END}{after}')
