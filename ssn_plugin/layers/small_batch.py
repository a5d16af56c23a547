"""The warning that BN learns nothing of its own from one sample at a time."""

import warnings

from torch import nn

from ssn_plugin.layers.frozen import known_choices

_warned = False


def warn_of_one_sample(layer: nn.Module) -> None:
    """Warn once per process that 'BN' saw a batch of one sample, unless the layer left it.

    Args:
        layer: A layer in training, whose candidates include 'BN' with running statistics.
    """
    global _warned
    if _warned:
        return
    choices = known_choices(layer)
    if None not in choices and layer.normalizers.index('BN') not in choices:
        return
    _warned = True
    warnings.warn(
        f"{type(layer).__name__} got a batch of one sample in training. There 'BN' computes what "
        "'IN' does, but in evaluation it uses running statistics: a layer that chooses it performs "
        "worse then. Leave it out with normalizers=('IN', 'LN') and a begin for SSNRadiusHook, "
        'take more samples per process, or let several processes share statistics with SyncSSN.',
        stacklevel=4,
    )
