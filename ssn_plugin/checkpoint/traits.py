"""What a backbone's weights do not show and its checkpoint tells beside them, under ``meta``.

``normalizers`` are the candidates of its layers in their order, without which an importance ratio
has no name; ``stem_padding`` is that of the stem's pool.
"""

from collections.abc import Mapping

from torch import nn

from ssn_plugin.checkpoint.candidates import (
    Candidates,
    are_candidates,
    configured_candidates,
    recorded_candidates,
)
from ssn_plugin.checkpoint.files import meta_in, state_in
from ssn_plugin.checkpoint.selection import Selected
from ssn_plugin.layers.switchable import SwitchableNorm


def traits_of(backbone: nn.Module) -> dict[str, object]:
    """What the checkpoint of a backbone should tell.

    Example:
        >>> from torch import nn
        >>> from ssn_plugin import SSN
        >>> from ssn_plugin.checkpoint.traits import traits_of
        >>> traits_of(nn.Sequential(SSN(8, normalizers=('BN', 'LN'))))
        {'normalizers': ['BN', 'LN']}
    """
    candidates = {
        module.normalizers for module in backbone.modules() if isinstance(module, SwitchableNorm)
    }
    traits = {}
    if len(candidates) == 1:
        traits['normalizers'] = list(candidates.pop())
    padding = getattr(backbone, 'stem_padding', None)
    if padding is not None:
        traits['stem_padding'] = padding
    return traits


def told_traits(checkpoint: Mapping) -> dict[str, object]:
    """What a checkpoint tells of its backbone."""
    meta, told = meta_in(checkpoint), {}
    if are_candidates(meta.get('normalizers')):
        told['normalizers'] = list(meta['normalizers'])
    if meta.get('stem_padding') in (0, 1):
        told['stem_padding'] = int(meta['stem_padding'])
    return told


def told_candidates(checkpoint: Mapping) -> Candidates:
    """What a checkpoint tells of the candidates of its layers: in itself, ``meta`` and config.

    Example:
        >>> from ssn_plugin.checkpoint.traits import told_candidates
        >>> told_candidates({'meta': {'normalizers': ['BN', 'LN']}, 'state_dict': {}})
        Candidates(backbone=('BN', 'LN'), configured={}, layers={})
    """
    config = meta_in(checkpoint).get('cfg')
    return Candidates(
        tuple(told_traits(checkpoint).get('normalizers', ())),
        configured_candidates(config) if isinstance(config, str) else {},
        recorded_candidates(state_in(checkpoint)),
    )


def told_selection(checkpoint: Mapping) -> dict[str, Selected]:
    """What a checkpoint tells of the choices of layers that are collapsed.

    Example:
        >>> from ssn_plugin.checkpoint.traits import told_selection
        >>> told_selection({'meta': {'collapsed': {'sn1': ('LN', 'BN')}}})
        {'sn1': Selected(mean='LN', var='BN')}
    """
    told = meta_in(checkpoint).get('collapsed')
    if not isinstance(told, Mapping):
        return {}
    return {
        str(name): Selected(*map(str, pair))
        for name, pair in told.items()
        if isinstance(pair, list | tuple) and len(pair) == 2
    }
