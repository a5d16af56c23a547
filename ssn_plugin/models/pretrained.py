"""Loads the weights a backbone starts from and accounts for every key of them."""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlparse

import torch
from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ssn_plugin.analysis.config_entries import as_list
from ssn_plugin.checkpoint.candidates import Candidates
from ssn_plugin.checkpoint.files import read_checkpoint, weights_in
from ssn_plugin.checkpoint.layout import describe, shown
from ssn_plugin.checkpoint.matching import check_match, is_repeated
from ssn_plugin.checkpoint.release import released
from ssn_plugin.checkpoint.selection import selections
from ssn_plugin.checkpoint.traits import told_traits, traits_of
from ssn_plugin.checkpoint.unpickling import explain_load_error, weights_only
from ssn_plugin.checkpoint.warm_start import bn_ratio_of, by_part, fit, warm_start
from ssn_plugin.errors import CheckpointError


def load_checkpoint(path: str, allow_pickle: bool = False) -> dict:
    """Read a checkpoint by file name, or by an address that mmengine knows, to the CPU.

    An address is ``https://...`` or ``bn2ssn://...``, for example.

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
        except CheckpointError:
            raise
        except Exception as error:
            # The scheme does not know the name, or there is no network.
            raise explain_load_error(path, error) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path}: holds a {type(checkpoint).__name__}, expected a dict')
    return checkpoint


def _check_download(address: str) -> None:
    """Compare the file of an address with the released one whose name it bears."""
    name = os.path.basename(urlparse(address).path)
    kept = os.path.join(torch.hub.get_dir(), 'checkpoints', name)
    if address.startswith(('http://', 'https://')) and os.path.isfile(kept):
        released(kept)


def pretrained_entries(init_cfg: object) -> Iterator[dict]:
    """The entries of an ``init_cfg``, a dict, a list of dicts or None, that load a checkpoint."""
    yield from (entry for entry in as_list(init_cfg) if _loads(entry))


def without_pretrained(init_cfg: object) -> list[dict]:
    """The other entries of an ``init_cfg``."""
    return [entry for entry in as_list(init_cfg) if not _loads(entry)]


def _loads(entry: dict) -> bool:
    return entry.get('type') in ('Pretrained', PretrainedInit)  # the class in Python configs


def load_pretrained(backbone: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Fill a backbone; mmengine itself would only log what it cannot load.

    Raises:
        CheckpointError: If a layer refuses what it is given.
    """
    try:
        backbone.load_state_dict(state, strict=False)  # the file holds the classifier too
    except RuntimeError as error:
        raise CheckpointError(f'{path}: {" ".join(str(error).split())}') from error
    if hasattr(backbone, '_params_init_info'):
        update_init_info(backbone, init_info=f'PretrainedInit: load from {path}')


def checked_weights(backbone: nn.Module, entry: dict) -> tuple[OrderedDict[str, Tensor], str]:
    """Read the weights for a backbone and see that they fill it.

    Returns:
        The weights, and in one line what they bring.

    Raises:
        CheckpointError: Naming the missing, unexpected and misshapen keys, and the reason if it can
            be told.
    """
    path = entry['checkpoint']
    checkpoint = load_checkpoint(path)
    ratio = bn_ratio_of(checkpoint)
    fitted = fit(backbone, _weights_of(entry, checkpoint), path, ratio)
    own, state = backbone.state_dict(), fitted.state
    new = check_match(own, state, path)
    told, traits = told_traits(checkpoint), traits_of(backbone)
    if ratio is None:  # a warm start uses the candidates of the layers
        _check_candidates(told, traits, path)
    warn_of_padding(backbone, checkpoint, path)
    chosen = selections(
        {key: value for key, value in state.items() if key in own},
        Candidates(backbone=tuple(traits.get('normalizers', ()))),
    )
    # A copied state dict has lost the layers' own record.
    if ratio is None and 'normalizers' in told:
        state._metadata = {name: {'normalizers': told['normalizers']} for name in chosen}
    counters = sum(key.endswith('.num_batches_tracked') for key in own)  # released files have none
    decided = sum(None not in selection for selection in chosen.values())
    count = (
        f'{len(own) - counters - len(new)} of {len(own) - counters}'
        if new
        else (f'all {len(own) - counters}')
    )
    lines = [
        f'SSNResNet: {count} weights and buffers filled from {path}, '
        f'a {describe(state)}{_told_decided(decided, len(chosen))}',
        *fitted.lines,
    ]
    if new:
        lines.append(f'new, so not in the file: {shown(new)}')
    left_out = [*fitted.left_out, *(key for key in state if key not in own)]
    if left_out:
        lines.append(f'left out of the file: {by_part(left_out)}')
    return state, '; '.join(lines)


def _told_decided(decided: int, layers: int) -> str:
    if not layers:
        return ''
    if not decided:
        return f'; its {layers} switchable layers are mixtures'
    rest = '' if decided == layers else ', the others are mixtures'
    return f'; {decided} of its {layers} switchable layers are decided{rest}'


def _weights_of(entry: dict, checkpoint: Mapping) -> OrderedDict[str, Tensor]:
    """The weights of a checkpoint, those below ``prefix`` if the entry names one."""
    path, prefix = entry['checkpoint'], entry.get('prefix')
    state = weights_in(checkpoint, path)
    if prefix is None:
        return state
    start = f'{prefix.removesuffix(".")}.'
    state = OrderedDict(
        (key.removeprefix(start), value) for key, value in state.items() if key.startswith(start)
    )
    if not state:
        raise CheckpointError(f'{path}: holds nothing under prefix={prefix!r}')
    return state


def warn_of_padding(backbone: nn.Module, checkpoint: Mapping, path: str) -> None:
    """Warn where the stem's pool is not the one that the weights were trained with."""
    padding, own = told_traits(checkpoint).get('stem_padding'), backbone.stem_padding
    if padding is not None and padding != own:
        print_log(
            f'SSNResNet: {path} was trained with a stem that pools with padding {padding}, this '
            f'backbone pools with {own}: set stem_padding={padding} in it',
            logger='current',
            level=logging.WARNING,
        )


def load_warm_start(module: nn.Module, entry: dict) -> None:
    """Fill any module from an entry that names ``bn2ssn://`` or ``sn2ssn://``.

    Raises:
        CheckpointError: If the file cannot be read, or its norms do not fit the module's.
    """
    path = entry['checkpoint']
    checkpoint = load_checkpoint(path)
    weights = _weights_of(entry, checkpoint)
    try:
        state, lines, anew = warm_start(module, weights, path, bn_ratio_of(checkpoint))
    except CheckpointError:
        # Some networks give their own init_cfg to every block, and are filled after these.
        if not is_repeated(module.state_dict(), weights):
            raise
        told = f'{path} has several such parts and is left to the module around it'
        print_log(f'{type(module).__name__}: {told}', logger='current')
        return
    load_pretrained(module, state, path)
    log_warm_start(type(module).__name__, lines, anew)


def log_warm_start(name: str, lines: Sequence[str], anew: str) -> None:
    """Say what a warm start brought; as a warning what it did not."""
    for line in lines:
        print_log(f'{name}: {line}', logger='current')
    if anew:
        print_log(f'{name}: {anew}', logger='current', level=logging.WARNING)


def _check_candidates(told: Mapping, traits: Mapping, path: str) -> None:
    """Refuse ratios of other candidates, or of the same in another order: the numbers would fit."""
    file, layers = told.get('normalizers'), traits.get('normalizers')
    if file and layers and list(file) != list(layers):
        raise CheckpointError(
            f'{path}: its layers choose among {tuple(file)}, those of the backbone among '
            f'{tuple(layers)}: set normalizers={tuple(file)} in norm_cfg'
        )
