"""The checkpoint prefixes ``bn2ssn://`` and ``sn2ssn://``, for every place that names a checkpoint.

``checkpoint='bn2ssn://resnet50.pth'`` or ``'bn2ssn://torchvision://resnet50'`` in a config is the
file or address behind the prefix, converted while it is loaded.
"""

from ssn_plugin.checkpoint.files import weights_in
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
