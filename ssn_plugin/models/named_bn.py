"""Norms that mmcv's ConvModule calls ``bn``, as the networks of mmaction2 expect.

mmcv names a norm after its class: ``sn`` for SSN, as in the released files. The networks of
mmaction2 reach for ``conv3.bn`` by that name, to start a residual block at zero, to inflate a 2-D
network and to freeze stages, and fail with every norm that is called otherwise, GroupNorm too.

mmcv reads the name from the class that a config names; what these classes build is the layer.
"""

from torch import nn

from ssn_plugin.layers.ssn import SSN
from ssn_plugin.layers.switch_norm import SN
from ssn_plugin.layers.sync_ssn import SyncSSN


class _NamedBN:
    _abbr_ = 'bn'
    _layer: type[nn.Module]

    def __new__(cls, *args, **kwargs) -> nn.Module:
        return cls._layer(*args, **kwargs)


class SSNNamedBN(_NamedBN):
    """:class:`ssn_plugin.SSN` under the name ``bn``, for mmaction2.

    Example:
        >>> norm_cfg = dict(type='SSNNamedBN')  # in a config
        >>> from ssn_plugin.models.named_bn import SSNNamedBN
        >>> type(SSNNamedBN(8)).__name__
        'SSN'
    """

    _layer = SSN


class SyncSSNNamedBN(_NamedBN):
    """:class:`ssn_plugin.SyncSSN` under the name ``bn``, for mmaction2."""

    _layer = SyncSSN


class SNNamedBN(_NamedBN):
    """:class:`ssn_plugin.SN` under the name ``bn``, for mmaction2."""

    _layer = SN


class GNNamedBN(_NamedBN):
    """``nn.GroupNorm`` under the name ``bn``, for mmaction2."""

    def __new__(cls, num_features: int, num_groups: int = 32, **kwargs) -> nn.Module:
        """Build it, with the arguments in the order of the other norms."""
        return nn.GroupNorm(num_groups, num_features, **kwargs)
