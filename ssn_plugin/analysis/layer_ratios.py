"""Importance ratios as rows, one per layer: of a model, or of a state dict without its model."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssn_plugin.analysis.places import Place, place_of
from ssn_plugin.checkpoint.candidates import Candidates, candidate_names
from ssn_plugin.checkpoint.layout import norm_layers
from ssn_plugin.checkpoint.selection import ratios_in
from ssn_plugin.layers.ssn import SSN
from ssn_plugin.layers.switchable import SwitchableNorm

STATISTICS = ('mean', 'var')


class LayerRatios(NamedTuple):
    """What one layer chose.

    Attributes:
        layer: Name of the layer in the model.
        normalizers: Names of the K candidates.
        mean_ratios: K importance ratios of the means.
        var_ratios: K importance ratios of the variances.
        radius: Radius of an SSN, None for an SN.
        mean_fixed: Whether the ratios of the means are decided.
        var_fixed: Whether the ratios of the variances are decided.
        channels: C, None where a state dict holds nothing of that size.
    """

    layer: str
    normalizers: tuple[str, ...]
    mean_ratios: tuple[float, ...]
    var_ratios: tuple[float, ...]
    radius: float | None = None
    mean_fixed: bool = False
    var_fixed: bool = False
    channels: int | None = None

    @property
    def decided(self) -> bool:
        """Whether both ratio vectors are one-hot."""
        return None not in self.selected

    @property
    def selected(self) -> tuple[str | None, str | None]:
        """Normalizers that mean and variance chose; None where ratios are not one-hot."""
        return tuple(
            self.normalizers[ratios.index(1.0)] if 1.0 in ratios else None
            for ratios in (self.mean_ratios, self.var_ratios)
        )

    @property
    def place(self) -> Place:
        """Stage and kind of the layer, by its name."""
        return place_of(self.layer)

    def ratios(self, statistic: str) -> dict[str, float]:
        """Ratio of each candidate, of the statistic 'mean' or 'var'."""
        values = getattr(self, f'{statistic}_ratios')
        return dict(zip(self.normalizers, values, strict=True))


@torch.no_grad()
def layer_ratios(model: nn.Module) -> list[LayerRatios]:
    """One row per SSN and SN layer of a model, in the order of the modules.

    The whole model costs one synchronisation with the device.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN
        >>> from ssn_plugin.analysis.layer_ratios import layer_ratios
        >>> rows = layer_ratios(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8)))
        >>> rows[0].layer, rows[0].decided, rows[0].channels
        ('1', False, 8)
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SwitchableNorm)}
    if not layers:
        return []
    pieces = []
    for layer in layers.values():
        pieces += [layer.mean_ratios, layer.var_ratios]
        if isinstance(layer, SSN):
            pieces += [layer.radius, layer.mean_fixed, layer.var_fixed]
    numbers = iter(torch.cat([piece.detach().float().reshape(-1) for piece in pieces]).tolist())
    rows = []
    for name, layer in layers.items():
        mean, var = (tuple(next(numbers) for _ in layer.normalizers) for _ in STATISTICS)
        own = ()
        if isinstance(layer, SSN):
            own = (next(numbers), next(numbers) > 0, next(numbers) > 0)
        rows.append(
            LayerRatios(name, layer.normalizers, mean, var, *own, channels=layer.num_features)
        )
    return rows


@torch.no_grad()
def layer_ratios_of_state(
    state: Mapping[str, Tensor], told: Candidates | None = None
) -> list[LayerRatios]:
    """One row per SSN and SN layer of a state dict, in its order; the model is not built.

    Args:
        state: State dict of this package, or of the authors' SSN and SN releases.
        told: Candidates, where they are known: of
            :func:`ssn_plugin.checkpoint.traits.told_candidates`.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN
        >>> from ssn_plugin.analysis.layer_ratios import *
        >>> model = torch.nn.Sequential(SSN(8))
        >>> layer_ratios_of_state(model.state_dict()) == layer_ratios(model)
        True
    """
    rows = []
    for name, kind in norm_layers(state).items():
        if kind not in ('SSN', 'SN'):
            continue
        radius = None
        if kind == 'SSN':
            radius = float(state.get(f'{name}.radius', torch.zeros(())))
        ratios = [tuple(ratios_in(state, name, statistic, kind)) for statistic in STATISTICS]
        fixed = [
            kind == 'SSN' and bool(state[f'{name}.{statistic}_fixed'].any())
            for statistic in STATISTICS
        ]
        names = candidate_names(state, name, len(ratios[0]), told)
        per_channel = (state.get(f'{name}.{key}') for key in ('weight', 'running_mean'))
        channels = next((v.numel() for v in per_channel if v is not None), None)
        rows.append(LayerRatios(name, names, *ratios, radius, *fixed, channels))
    return rows
