"""Loads the weights a backbone starts from and accounts for every key of them."""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from urllib.parse import urlparse

import torch
from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ssn_plugin.checkpoint.candidates import Candidates
from ssn_plugin.checkpoint.files import read_checkpoint, weights_in
from ssn_plugin.checkpoint.layout import describe, our_names
from ssn_plugin.checkpoint.matching import check_match
from ssn_plugin.checkpoint.release import released
from ssn_plugin.checkpoint.selection import selections
from ssn_plugin.checkpoint.traits import told_traits, traits_of
from ssn_plugin.checkpoint.unpickling import explain_load_error, weights_only
from ssn_plugin.errors import CheckpointError


def load_checkpoint(path: str, allow_pickle: bool = False) -> dict:
    """Read a checkpoint by file name, or by an address that mmengine knows.

    Args:
        path: A file, or an address such as ``https://...`` or ``bn2ssn://...``.
        allow_pickle: Unpickle code in it, which is then trusted.

    Returns:
        What it holds, on the CPU.

    Raises:
        CheckpointError: If there is none, it cannot be read without running code that is in it, or
            it bears the name of a released file and is another one.
    """
    if '://' not in path:
        path = os.path.expanduser(path)
        checkpoint = read_checkpoint(path, allow_pickle)
        released(path)
        return checkpoint
    with weights_only(allow_pickle):
        try:
            checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
            _check_download(path)
            return checkpoint
        except CheckpointError:
            raise
        except Exception as error:
            # A name unknown to the scheme, no network, what unpickling raises.
            raise explain_load_error(path, error) from error


def _check_download(address: str) -> None:
    """Compare the file of an address with the released one whose name it bears."""
    name = os.path.basename(urlparse(address).path)
    kept = os.path.join(torch.hub.get_dir(), 'checkpoints', name)
    if address.startswith(('http://', 'https://')) and os.path.isfile(kept):
        released(kept)


def pretrained_entries(init_cfg: object) -> Iterator[dict]:
    """The entries of an ``init_cfg`` that load a checkpoint.

    Args:
        init_cfg: A dict, a list of dicts or None.
    """
    yield from (entry for entry in _entries(init_cfg) if _loads(entry))


def without_pretrained(init_cfg: object) -> list[dict]:
    """The other entries of an ``init_cfg``.

    Args:
        init_cfg: A dict, a list of dicts or None.
    """
    return [entry for entry in _entries(init_cfg) if not _loads(entry)]


def _entries(init_cfg: object) -> list[dict]:
    return list(init_cfg) if isinstance(init_cfg, list | tuple) else [init_cfg] if init_cfg else []


def _loads(entry: dict) -> bool:
    return entry.get('type') in ('Pretrained', PretrainedInit)  # the class in Python configs


def load_pretrained(backbone: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Fill a backbone; mmengine itself would only log what it cannot load.

    Args:
        backbone: Any module of mmengine.
        state: Of :func:`checked_weights`.
        path: Where it is from.

    Raises:
        CheckpointError: If a layer refuses what it is given.
    """
    try:
        backbone.load_state_dict(state, strict=False)  # it holds the classifier too
    except RuntimeError as error:
        raise CheckpointError(f'{path}: {" ".join(str(error).split())}') from error
    if hasattr(backbone, '_params_init_info'):
        update_init_info(backbone, init_info=f'PretrainedInit: load from {path}')


def checked_weights(backbone: nn.Module, entry: dict) -> tuple[OrderedDict[str, Tensor], str]:
    """Read the weights for a backbone and see that they fill it.

    Args:
        backbone: With ``stem_padding``, the padding of its stem's pool.
        entry: Of :func:`pretrained_entries`.

    Returns:
        The weights, and in one line what they bring.

    Raises:
        CheckpointError: Naming the missing, unexpected and misshapen keys, and the reason if it can
            be told.
    """
    path = entry['checkpoint']
    checkpoint = load_checkpoint(path)
    state = weights_in(checkpoint, path)
    prefix = entry.get('prefix')
    if prefix is not None:
        prefix = f'{prefix.removesuffix(".")}.'
        state = OrderedDict(
            (key.removeprefix(prefix), value)
            for key, value in state.items()
            if key.startswith(prefix)
        )
        if not state:
            converted = path.startswith(('bn2ssn://', 'sn2ssn://'))
            why = ': the conversion takes the backbone out; leave prefix out' * converted
            raise CheckpointError(f'{path}: holds nothing under prefix={entry["prefix"]!r}{why}')
    own = backbone.state_dict()
    state = _in_names_of(own, state)
    check_match(own, state, path)
    told, traits = told_traits(checkpoint), traits_of(backbone)
    _check_candidates(told, traits, path)
    padding = told.get('stem_padding')
    if padding is not None and padding != backbone.stem_padding:
        print_log(
            f'SSNResNet: {path} was trained with a stem that pools with padding {padding}, this '
            f'backbone pools with {backbone.stem_padding}: set stem_padding={padding} in it',
            logger='current',
            level=logging.WARNING,
        )
    chosen = selections(
        {key: value for key, value in state.items() if key in own},
        Candidates(tuple(traits.get('normalizers', ()))),
    )
    counters = sum(key.endswith('.num_batches_tracked') for key in own)  # released files have none
    decided = sum(None not in selection for selection in chosen.values())
    return state, (
        f'SSNResNet: all {len(own) - counters} weights and buffers filled from {path}, '
        f'a {describe(state)}; '
        f'{decided} of its {len(chosen)} switchable layers are decided and stay so'
    )


def _in_names_of(
    own: Mapping[str, Tensor], state: OrderedDict[str, Tensor]
) -> OrderedDict[str, Tensor]:
    """Keys as the backbone calls them, where published files have other names.

    That is so in mmpretrain, and with BatchNorm or GroupNorm in the backbone and in the file.
    """
    if own.keys() <= state.keys():
        return state
    same_norm = describe(state).norm in ('BN', 'GN')
    called = {
        ours: key
        for key, ours in our_names(own).items()
        if same_norm or key.startswith('stem.') or '.downsample.' in key
    }
    return OrderedDict((called.get(key, key), value) for key, value in state.items())


def _check_candidates(told: Mapping, traits: Mapping, path: str) -> None:
    """Refuse ratios of other candidates, or of the same in another order: the numbers would fit."""
    file, layers = told.get('normalizers'), traits.get('normalizers')
    if file and layers and list(file) != list(layers):
        raise CheckpointError(
            f'{path}: its layers choose among {tuple(file)}, those of the backbone among '
            f'{tuple(layers)}: set normalizers={tuple(file)} in norm_cfg'
        )
