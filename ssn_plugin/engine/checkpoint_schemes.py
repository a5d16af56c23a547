"""The checkpoint prefixes ``bn2ssn://``, ``sn2ssn://`` and ``named_bn://``, wherever one is named.

``checkpoint='bn2ssn://resnet50.pth'`` or ``'bn2ssn://torchvision://resnet50'`` in a config is the
file or address behind the prefix, converted while it is loaded.
"""

import re

from mmengine.logging import print_log
from torch import Tensor

from ssn_plugin.checkpoint.files import weights_in
from ssn_plugin.checkpoint.layout import backbone_of, norm_layers
from ssn_plugin.checkpoint.warm_start import (
    CANDIDATES,
    STEM_PADDING,
    batch_norm_to_ssn,
    switch_norm_to_ssn,
)
from ssn_plugin.models.pretrained import load_checkpoint


def load_from_bn2ssn(filename: str, map_location: object = None) -> dict:
    """Load a ResNet with BatchNorm as one with SSN, BN at an importance ratio of 0.9.

    Args:
        filename: ``bn2ssn://`` and a file, or an address that mmengine knows.
        map_location: Unused: the weights come to the CPU.

    Returns:
        A checkpoint with ``state_dict`` and ``meta``.

    Raises:
        CheckpointError: If it cannot be loaded or holds no ResNet with BatchNorm.
    """
    source = filename.removeprefix('bn2ssn://')
    state = batch_norm_to_ssn(weights_in(load_checkpoint(source), source), source)
    if any(name.endswith('.bn') for name in norm_layers(state)):  # of a ConvModule
        print_log(
            f"{filename}: its norms are called bn, for norm_cfg=dict(type='SSNNamedBN')",
            logger='current',
        )
    meta = {'stem_padding': STEM_PADDING, 'normalizers': list(CANDIDATES)}
    return {'meta': meta, 'state_dict': state}


def load_from_sn2ssn(filename: str, map_location: object = None) -> dict:
    """Load a ResNet with SN as one with SSN of the same importance ratios.

    Args:
        filename: ``sn2ssn://`` and a file, or an address that mmengine knows.
        map_location: Unused: the weights come to the CPU.

    Returns:
        A checkpoint with ``state_dict``.

    Raises:
        CheckpointError: If it cannot be loaded or holds no ResNet with SN.
    """
    source = filename.removeprefix('sn2ssn://')
    return {'state_dict': switch_norm_to_ssn(weights_in(load_checkpoint(source), source), source)}


def load_from_named_bn(filename: str, map_location: object = None) -> dict:
    """Load a ResNet in the names and shapes of torchvision: bn1 for sn1, (C,) for (1, C, 1, 1).

    So mmaction2 looks for the weights that it inflates to three dimensions, or puts into its own
    ResNet; ``named_bn://bn2ssn://resnet50.pth`` is both conversions, one after the other.

    Args:
        filename: ``named_bn://`` and a file, or an address that mmengine knows.
        map_location: Unused: the weights come to the CPU.

    Returns:
        A checkpoint with ``state_dict``.

    Raises:
        CheckpointError: If it cannot be loaded or holds no ResNet.
    """
    source = filename.removeprefix('named_bn://')
    state, _ = backbone_of(weights_in(load_checkpoint(source), source), source)
    norms = norm_layers(state)
    return {'state_dict': {_with_bn(key): _flat(key, state, norms) for key in state}}


def _with_bn(key: str) -> str:
    return re.sub(r'(^|\.)sn(\d)\.', r'\1bn\2.', key)


def _flat(key: str, state: dict[str, Tensor], norms: dict[str, str]) -> Tensor:
    layer, _, name = key.rpartition('.')
    if layer not in norms:
        return state[key]
    one = name in ('mean_fixed', 'var_fixed', 'radius', 'num_batches_tracked')
    return state[key].reshape(()) if one else state[key].flatten()
