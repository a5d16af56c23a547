"""All that can be said of the choices of some models, as files in a folder.

Importing this module imports matplotlib.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ssn_plugin.analysis.comparison import differences, write_comparison
from ssn_plugin.analysis.figures import save_both
from ssn_plugin.analysis.layer_ratios import LayerRatios
from ssn_plugin.analysis.plots import comparison_figure, selection_figure, share_figure
from ssn_plugin.analysis.tables import write_csv, write_json


def write_selection(
    sources: Mapping[str, Sequence[LayerRatios]],
    folder: Path,
    progress: Callable[[Sequence], Iterable] = iter,
) -> list[Path]:
    """Write tables and figures of one or more models, and their comparison.

    ``selection.csv`` and ``selection.json``; for each model a figure of its ratios and one of the
    shares; for several ``comparison.csv`` and a figure. Figures are PNG and SVG.

    ``progress`` wraps the sequence of figures, to show how far it is.
    """
    tables = [folder / 'selection.csv', folder / 'selection.json']
    write_csv(sources, tables[0])
    write_json(sources, tables[1])
    jobs = []
    for number, (name, rows) in enumerate(sources.items(), 1):
        suffix = f'-{number}' if len(sources) > 1 else ''
        jobs.append((f'selection{suffix}', selection_figure, rows, name))
        jobs.append((f'shares{suffix}', share_figure, rows, name))
    if len(sources) > 1:
        tables.append(folder / 'comparison.csv')
        write_comparison(differences(sources), list(sources), tables[-1])
        *others, last = sources
        title = f'{", ".join(others)} and {last}'
        jobs.append(('comparison', comparison_figure, sources, title))
    figures = []
    for name, draw, rows, title in progress(jobs):
        figures += save_both(draw(rows, title), folder, name)
    return tables + figures
