"""Rows of importance ratios as a table on the terminal, as CSV and as JSON."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssn_plugin.analysis.comparison import Difference, headline
from ssn_plugin.analysis.layer_ratios import STATISTICS, LayerRatios
from ssn_plugin.checkpoint.whole_file import whole_file

if TYPE_CHECKING:
    from rich.table import Table


def records(rows: Sequence[LayerRatios]) -> list[dict]:
    """Two records per layer, one for the mean and one for the variance.

    Returns:
        Dicts of ``depth`` (1 for the layer nearest the input), ``layer``, ``stage``, ``kind``,
        ``channels``, ``statistic``, ``ratios`` (a dict), ``selected`` (None while undecided),
        ``fixed``, ``radius``.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN
        >>> from ssn_plugin.analysis.layer_ratios import layer_ratios
        >>> from ssn_plugin.analysis.tables import records
        >>> first, _ = records(layer_ratios(torch.nn.Sequential(SSN(8))))
        >>> first['statistic'], first['selected'], list(first['ratios'])
        ('mean', None, ['IN', 'LN', 'BN'])
    """
    return [
        dict(
            depth=depth,
            layer=row.layer,
            stage=row.place.stage,
            kind=row.place.kind,
            channels=row.channels,
            statistic=statistic,
            ratios=row.ratios(statistic),
            selected=selected,
            fixed=getattr(row, f'{statistic}_fixed'),
            radius=row.radius,
        )
        for depth, row in enumerate(rows, 1)
        for statistic, selected in zip(STATISTICS, row.selected, strict=True)
    ]


def write_json(sources: Mapping[str, Sequence[LayerRatios]], path: Path) -> None:
    """Write the records of one or more models: name -> list of :func:`records`."""
    content = {name: records(rows) for name, rows in sources.items()}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + '\n')


def write_csv(sources: Mapping[str, Sequence[LayerRatios]], path: Path) -> None:
    """Write the records of one or more models, a column per candidate."""
    candidates = list(
        dict.fromkeys(n for rows in sources.values() for r in rows for n in r.normalizers)
    )
    names = ['depth', 'layer', 'stage', 'kind', 'channels', 'statistic']
    columns = ['source', *names, *candidates, 'selected', 'fixed', 'radius']
    with whole_file(path) as temporary, temporary.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for source, rows in sources.items():
            for record in records(rows):
                ratios = record.pop('ratios')
                record['fixed'] = int(record['fixed'])
                writer.writerow({'source': source, **record, **ratios})


def selection_table(rows: Sequence[LayerRatios], title: str) -> 'Table':
    """A table for the terminal, by rich."""
    from rich.table import Table

    table = Table(title=title, title_justify='left', header_style='bold')
    for heading in ('#', 'C'):
        table.add_column(heading, justify='right')
    for heading in ('stage', 'layer', 'mean', 'variance', 'decided'):
        table.add_column(heading, no_wrap=heading != 'layer', overflow='fold')
    for depth, row in enumerate(rows, 1):
        place = row.place
        decided = {(True, True): 'both', (True, False): 'mean', (False, True): 'variance'}
        table.add_row(
            str(depth),
            '' if row.channels is None else str(row.channels),
            place.stage,
            place.label,
            *(shown_ratios(row, statistic) for statistic in STATISTICS),
            decided.get((row.mean_fixed, row.var_fixed), ''),
            end_section=depth < len(rows) and rows[depth].place.stage != place.stage,
        )
    return table


def difference_table(found: Sequence[Difference], sources: Sequence[str]) -> 'Table':
    """The layers in which models prefer different normalizers, for the terminal, by rich."""
    from rich.table import Table

    differing = [difference for difference in found if difference.differs]
    table = Table(
        title=headline(found),
        title_justify='left',
        header_style='bold',
    )
    for heading in ('layer', 'statistic', *sources):
        table.add_column(heading, overflow='fold')
    table.add_column('distance', justify='right')
    for layer, statistic, leading, distance in differing:
        shown = [name or '-' for name in leading]
        table.add_row(layer, statistic, *shown, f'{distance:.2f}')
    return table


def shown_ratios(row: LayerRatios, statistic: str) -> str:
    """The one normalizer, or the ratio of each candidate in percent.

    Example:
        >>> from ssn_plugin.analysis.layer_ratios import LayerRatios
        >>> from ssn_plugin.analysis.tables import shown_ratios
        >>> row = LayerRatios('sn1', ('IN', 'BN'), (0.25, 0.75), (0.0, 1.0))
        >>> shown_ratios(row, 'mean'), shown_ratios(row, 'var')
        ('IN 25 BN 75', 'BN')
    """
    selected = dict(zip(STATISTICS, row.selected, strict=True))[statistic]
    if selected is not None:
        return selected
    return ' '.join(f'{name} {100 * ratio:.0f}' for name, ratio in row.ratios(statistic).items())
