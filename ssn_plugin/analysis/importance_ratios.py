"""Importance ratios of a model as rows, one per layer."""

from typing import NamedTuple

from torch import nn

from ssn_plugin.layers.switchable import SwitchableNorm


class LayerRatios(NamedTuple):
    """What one layer chose.

    Attributes:
        layer: Name of the layer in the model.
        normalizers: Names of the K candidates.
        mean_ratios: K importance ratios of the means.
        var_ratios: K importance ratios of the variances.
    """

    layer: str
    normalizers: tuple[str, ...]
    mean_ratios: tuple[float, ...]
    var_ratios: tuple[float, ...]

    @property
    def decided(self) -> bool:
        """Whether both ratio vectors are one-hot."""
        return 1.0 in self.mean_ratios and 1.0 in self.var_ratios


def importance_ratios(model: nn.Module) -> list[LayerRatios]:
    """Rows (layer, candidates, mean ratios, variance ratios) in the order of the model's modules.

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
    return [
        LayerRatios(
            name,
            module.normalizers,
            tuple(module.mean_ratios.tolist()),
            tuple(module.var_ratios.tolist()),
        )
        for name, module in model.named_modules()
        if isinstance(module, SwitchableNorm)
    ]
