"""What the norm layers in a state dict chose, without building the model."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssn_plugin.checkpoint.candidates import Candidates, candidate_names
from ssn_plugin.checkpoint.layout import norm_layers
from ssn_plugin.functional import sparsestmax
from ssn_plugin.ops.sparsestmax import is_one_hot_radius


class Selected(NamedTuple):
    """The normalizers that one layer chose.

    Attributes:
        mean: Name or number, or None while the ratios are not one-hot.
        var: As ``mean``.
    """

    mean: str | None
    var: str | None


def selections(state: Mapping[str, Tensor], told: Candidates | None = None) -> dict[str, Selected]:
    """The choice of every SSN and SN layer of a state dict.

    Without ``told``, candidates are taken to be IN, LN, BN and GN, as many of them as there are
    ratios. Where the running statistics show that they are not, choices are numbers.

    Example:
        >>> from ssn_plugin import SSN, set_radius
        >>> from ssn_plugin.checkpoint.selection import selections
        >>> layer = SSN(8)
        >>> set_radius(layer, 1.0)
        >>> selections({f'sn1.{name}': value for name, value in layer.state_dict().items()})
        {'sn1': Selected(mean='BN', var='BN')}
    """
    found = {}
    for name, kind in norm_layers(state).items():
        if kind in ('SSN', 'SN'):
            found[name] = Selected(
                *(_choice(state, name, statistic, kind, told) for statistic in ('mean', 'var'))
            )
    return found


def histogram(selected: Mapping[str, Selected]) -> dict[str, int]:
    """How many layers chose which pair, as ``{'IN': 5, 'LN/BN': 2, 'undecided': 1}``.

    'LN/BN' is the mean of LN and the variance of BN.
    """
    names = Counter(
        'undecided'
        if None in selection
        else selection.mean
        if selection.mean == selection.var
        else f'{selection.mean}/{selection.var}'
        for selection in selected.values()
    )
    return dict(names.most_common())


def ratios_in(state: Mapping[str, Tensor], layer: str, statistic: str, kind: str) -> list[float]:
    """Importance ratios of one statistic, 'mean' or 'var', of a layer of the kind 'SSN' or 'SN'."""
    control = state[f'{layer}.{statistic}_weight'].detach().cpu().float().flatten()
    if kind == 'SN':
        return control.softmax(-1).tolist()
    if state[f'{layer}.{statistic}_fixed'].any():
        return nn.functional.one_hot(control.argmax(), len(control)).float().tolist()
    radius = state.get(f'{layer}.radius', torch.zeros(()))
    return sparsestmax(control, float(radius)).tolist()


def _choice(
    state: Mapping[str, Tensor],
    layer: str,
    statistic: str,
    kind: str,
    told: Candidates | None,
) -> str | None:
    ratios = ratios_in(state, layer, statistic, kind)
    radius = float(state.get(f'{layer}.radius', 0))
    decided = kind == 'SSN' and bool(state[f'{layer}.{statistic}_fixed'].any())
    # Without the flag or the radius, one-hot ratios are no choice yet: control parameters can
    # pass through them, and a softmax can round to them.
    if kind == 'SN' or not (decided or is_one_hot_radius(radius, len(ratios))) or 1.0 not in ratios:
        return None
    return candidate_names(state, layer, len(ratios), told)[ratios.index(1.0)]
