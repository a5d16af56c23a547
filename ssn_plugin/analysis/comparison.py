"""Which layers of two or more models chose differently."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ssn_plugin.analysis.layer_ratios import STATISTICS, LayerRatios
from ssn_plugin.checkpoint.whole_file import whole_file


class Difference(NamedTuple):
    """What became of one statistic of one layer.

    Attributes:
        layer: Its name, without the ``backbone.`` of a whole model.
        statistic: 'mean' or 'var'.
        leading: The candidate of the largest ratio in each model, None where the layer is not.
        distance: The largest distance of a model's ratios from those of the first: half the sum of
            the absolute differences, 0 for equal ratios and 1 for different one-hot ones.
    """

    layer: str
    statistic: str
    leading: tuple[str | None, ...]
    distance: float

    @property
    def differs(self) -> bool:
        """Whether not all models that have the layer prefer the same candidate."""
        return len(set(self.leading) - {None}) > 1


def headline(found: Sequence[Difference]) -> str:
    """How many layers differ, in words."""
    common = {difference.layer for difference in found if None not in difference.leading}
    differing = {difference.layer for difference in found if difference.differs}
    said = f'{len(differing & common)} of {len(common)} common layers prefer another normalizer'
    others = len(differing - common)  # of three models, two have them
    return f'{said}, and {others} that not all have' if others else said


def common_name(layer: str) -> str:
    """Name of a layer in a backbone and in a whole model alike.

    Example:
        >>> from ssn_plugin.analysis.comparison import common_name
        >>> common_name('backbone.layer1.0.sn1')
        'layer1.0.sn1'
    """
    return layer.removeprefix('backbone.')


def aligned(
    sources: Mapping[str, Sequence[LayerRatios]],
) -> tuple[list[str], dict[str, list[LayerRatios | None]]]:
    """The layers of all models in one order, and the rows of each model, None where it has none."""
    by_name = {
        source: {common_name(row.layer): row for row in rows} for source, rows in sources.items()
    }
    # Begin with the model that has most layers: its order tells where those of the others go.
    longest = sorted(by_name.values(), key=len, reverse=True)
    names = list(dict.fromkeys(name for rows in longest for name in rows))
    return names, {source: [rows.get(name) for name in names] for source, rows in by_name.items()}


def differences(sources: Mapping[str, Sequence[LayerRatios]]) -> list[Difference]:
    """Compare models layer by layer with the first one that has the layer.

    Example:
        >>> from ssn_plugin.analysis.comparison import differences
        >>> from ssn_plugin.analysis.layer_ratios import LayerRatios
        >>> before = [LayerRatios('sn1', ('IN', 'BN'), (1.0, 0.0), (0.5, 0.5))]
        >>> after = [LayerRatios('backbone.sn1', ('IN', 'BN'), (0.0, 1.0), (0.5, 0.5))]
        >>> [d.distance for d in differences({'before': before, 'after': after})]
        [1.0, 0.0]
    """
    names, rows = aligned(sources)
    found = []
    for column, name in enumerate(names):
        layers = [rows[source][column] for source in sources]
        for statistic in STATISTICS:
            ratios = [layer and layer.ratios(statistic) for layer in layers]
            leading = tuple(r and max(r, key=r.__getitem__) for r in ratios)
            there = [r for r in ratios if r]
            distance = max(_distance(there[0], other) for other in there)
            found.append(Difference(name, statistic, leading, distance))
    return found


def _distance(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    names = {*first, *second}
    return sum(abs(first.get(name, 0) - second.get(name, 0)) for name in names) / 2


def write_comparison(found: Sequence[Difference], sources: Sequence[str], path: Path) -> None:
    """Write differences as CSV, a column per model; ``sources`` are their names in that order."""
    with whole_file(path) as temporary, temporary.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['layer', 'statistic', *sources, 'differs', 'distance'])
        for row in found:
            writer.writerow(
                [row.layer, row.statistic, *row.leading, int(row.differs), f'{row.distance:.6f}']
            )
