"""The checkpoint prefixes ``bn2ssn://``, ``sn2ssn://`` and ``named_bn://``, wherever one is named.

``checkpoint='bn2ssn://resnet50.pth'`` or ``'bn2ssn://torchvision://resnet50'`` in a config is the
file or address behind the prefix, converted while it is loaded. What loads it then decides how well
it fits: an ``init_cfg`` and, with ``SSNRadiusHook``, ``load_from`` know the model and account for
every key (:func:`ssn_plugin.checkpoint.warm_start.warm_start`); mmengine's ``load_checkpoint`` by
itself goes by names, in which bn is sn.
"""

import os
import re

from mmengine.model import PretrainedInit
from torch import Tensor, nn

from ssn_plugin.checkpoint.files import read_checkpoint, weights_in
from ssn_plugin.checkpoint.layout import backbone_of, norm_layers
from ssn_plugin.checkpoint.warm_start import (
    BN_RATIO,
    STEM_PADDING,
    batch_norm_to_ssn,
    bn_ratio_of,
    switch_norm_to_ssn,
    warm_start,
)
from ssn_plugin.errors import CheckpointError
from ssn_plugin.models.pretrained import (
    load_checkpoint,
    load_warm_start,
    log_warm_start,
    warn_of_padding,
)

SCHEMES = ('bn2ssn://', 'sn2ssn://')
# What an SSN has beside what BatchNorm has.
_OWN = ('mean_weight', 'var_weight', 'radius', 'mean_fixed', 'var_fixed')


def load_from_bn2ssn(filename: str, map_location: object = None) -> dict:
    """Load a network with BatchNorm as one with SSN, BN at an importance ratio of 0.9.

    Args:
        filename: ``bn2ssn://`` and a file, or an address that mmengine knows.
        map_location: Unused: the weights come to the CPU.

    Returns:
        A checkpoint with ``state_dict`` and ``meta``.

    Raises:
        CheckpointError: If it cannot be loaded or holds no BatchNorm.
    """
    source = filename.removeprefix('bn2ssn://')
    weights = weights_in(load_checkpoint(source), source)
    state = batch_norm_to_ssn(weights, source)
    meta = {'stem_padding': STEM_PADDING, 'bn_ratio': BN_RATIO}
    # PIDNet takes weights from the top, by either name.
    return {**weights, **state, 'meta': meta, 'state_dict': state}


def load_from_sn2ssn(filename: str, map_location: object = None) -> dict:
    """Load a network with SN as one with SSN of the same importance ratios.

    Args:
        filename: ``sn2ssn://`` and a file, or an address that mmengine knows.
        map_location: Unused: the weights come to the CPU.

    Returns:
        A checkpoint with ``state_dict``.

    Raises:
        CheckpointError: If it cannot be loaded or holds no SN.
    """
    source = filename.removeprefix('sn2ssn://')
    return {'state_dict': switch_norm_to_ssn(weights_in(load_checkpoint(source), source), source)}


def load_from_named_bn(filename: str, map_location: object = None) -> dict:
    """Load a backbone in the names and shapes of torchvision: bn1 for sn1, (C,) for (1, C, 1, 1).

    So mmaction2 looks for the weights that it inflates to three dimensions, or puts into its own
    ResNet. Its TSM renames what BatchNorm has and nothing else, so the rest is there twice.
    ``named_bn://bn2ssn://resnet50.pth`` is both conversions, one after the other.

    Args:
        filename: ``named_bn://`` and a file, or an address that mmengine knows.
        map_location: Unused: the weights come to the CPU.

    Returns:
        A checkpoint with ``state_dict``.

    Raises:
        CheckpointError: If it cannot be loaded or holds no norm layers.
    """
    source = filename.removeprefix('named_bn://')
    state, _ = backbone_of(weights_in(load_checkpoint(source), source))
    norms = norm_layers(state)
    if not norms:
        raise CheckpointError(f'{source}: holds no norm layers')
    state = {_with_bn(key): _flat(key, state, norms) for key in state}
    return {'state_dict': state | {_with_conv(key): state[key] for key in state}}


def _with_bn(key: str) -> str:
    return re.sub(r'(^|\.)sn(\d*)\.', r'\1bn\2.', key)


def _with_conv(key: str) -> str:
    """What TSM calls the tensors that only SSN has: ``conv1.bn.radius`` for ``bn1.radius``."""
    layer, _, name = key.rpartition('.')
    if name in _OWN:
        layer = re.sub(r'(^|\.)bn(\d)$', r'\1conv\2.bn', layer)
        layer = re.sub(r'\.downsample\.1$', '.downsample.bn', layer)
    return f'{layer}.{name}'


def _flat(key: str, state: dict[str, Tensor], norms: dict[str, str]) -> Tensor:
    layer, _, name = key.rpartition('.')
    if layer not in norms:
        return state[key]
    one = name in ('mean_fixed', 'var_fixed', 'radius', 'num_batches_tracked')
    return state[key].reshape(()) if one else state[key].flatten()


class WarmStartInit(PretrainedInit):
    """``init_cfg=dict(type='Pretrained', ...)``, which fits a warm start to what it fills.

    A warm start is a checkpoint named with ``bn2ssn://`` or ``sn2ssn://``, or a file that
    ``tools/warm_start.py`` wrote. mmengine loads any other checkpoint as usual.
    """

    def __call__(self, module: nn.Module) -> None:
        """Fill the module that has the ``init_cfg``.

        Raises:
            CheckpointError: If a warm start cannot be read or its norms do not fit.
        """
        if self.checkpoint.startswith(SCHEMES) or _is_warm_start(self.checkpoint):
            load_warm_start(module, dict(checkpoint=self.checkpoint, prefix=self.prefix))
        else:
            super().__call__(module)


def _is_warm_start(path: str) -> bool:
    try:
        return os.path.isfile(path) and bn_ratio_of(read_checkpoint(path)) is not None
    except CheckpointError:  # for mmengine to complain of
        return False


def fit_loaded(model: nn.Module, checkpoint: dict) -> None:
    """Put what the prefix ``bn2ssn://`` loaded into the names of a model.

    The ``state_dict`` of the checkpoint is replaced; one that is no warm start is left alone.

    Raises:
        CheckpointError: If the norms do not fit.
    """
    ratio = bn_ratio_of(checkpoint)
    if ratio is not None:
        checkpoint['state_dict'], lines, anew = warm_start(
            model, weights_in(checkpoint, 'load_from'), 'load_from', ratio
        )
        log_warm_start(type(model).__name__, lines, anew)
        backbone = getattr(model, 'backbone', model)
        if hasattr(backbone, 'stem_padding'):
            warn_of_padding(backbone, checkpoint, 'load_from')
