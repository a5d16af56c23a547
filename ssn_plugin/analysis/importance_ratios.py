"""Importance ratios of a model as rows, one per layer."""

from typing import NamedTuple

import torch
from torch import nn

from ssn_plugin.layers.ssn import SSN
from ssn_plugin.layers.switchable import SwitchableNorm


class LayerRatios(NamedTuple):
    """What one layer chose.

    Attributes:
        layer: Name of the layer in the model.
        normalizers: Names of the K candidates.
        mean_ratios: K importance ratios of the means.
        var_ratios: K importance ratios of the variances.
        radius: Radius of an SSN, None for an SN.
    """

    layer: str
    normalizers: tuple[str, ...]
    mean_ratios: tuple[float, ...]
    var_ratios: tuple[float, ...]
    radius: float | None = None

    @property
    def decided(self) -> bool:
        """Whether both ratio vectors are one-hot."""
        return 1.0 in self.mean_ratios and 1.0 in self.var_ratios


@torch.no_grad()
def importance_ratios(model: nn.Module) -> list[LayerRatios]:
    """Rows (layer, candidates, mean ratios, variance ratios, radius) in the order of the modules.

    The whole model costs one synchronisation with the device.

    Args:
        model: A model with SSN or SN layers.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN
        >>> from ssn_plugin.analysis.importance_ratios import importance_ratios
        >>> rows = importance_ratios(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8)))
        >>> rows[0].layer, rows[0].decided
        ('1', False)
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SwitchableNorm)}
    if not layers:
        return []
    pieces = [ratios for layer in layers.values() for ratios in layer._ratios()]
    pieces += [layer.radius.reshape(1) for layer in layers.values() if isinstance(layer, SSN)]
    numbers = torch.cat([piece.float() for piece in pieces]).tolist()
    rows = []
    start = 0
    for name, layer in layers.items():
        size = len(layer.normalizers)
        middle, end = start + size, start + 2 * size
        rows.append(
            LayerRatios(
                name, layer.normalizers, tuple(numbers[start:middle]), tuple(numbers[middle:end])
            )
        )
        start = end
    radii = iter(numbers[start:])
    return [
        row._replace(radius=next(radii)) if isinstance(layers[row.layer], SSN) else row
        for row in rows
    ]
