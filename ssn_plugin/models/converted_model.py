"""ConvertedSSN: a network that names BatchNorm in its code, with SSN in its place."""

from collections.abc import Sequence

from mmengine.registry import MODELS
from torch import nn

from ssn_plugin.layers.convert import BN_RATIO, CANDIDATES, convert_batch_norm

NAME = 'ConvertedSSN'


def build_converted_ssn(
    network: str | type,
    normalizers: Sequence[str] = CANDIDATES,
    num_groups: int = 32,
    bn_ratio: float = BN_RATIO,
    **settings,
) -> nn.Module:
    """Build a part of a model, or a whole one, and turn its BatchNorms into SSN.

    It stands in the root registry under 'ConvertedSSN', for what has no ``norm_cfg``.

    Args:
        network: The ``type`` that it had, such as 'LeViT'.
        normalizers: As for :func:`ssn_plugin.convert_batch_norm`.
        num_groups: As there.
        bn_ratio: As there; without weights to start from, 1 / the number of candidates is neutral.
        **settings: The arguments of ``network``.

    Example:
        >>> from mmengine.registry import MODELS
        >>> from torch.nn import BatchNorm2d
        >>> import ssn_plugin
        >>> MODELS.build(dict(type='ConvertedSSN', network=BatchNorm2d, num_features=8)).selected
        (None, None)
    """
    built = MODELS.build(dict(type=network, **settings))
    return convert_batch_norm(built, bn_ratio, normalizers, num_groups)
