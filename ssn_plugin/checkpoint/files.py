"""Reads checkpoint files without running code in them, and writes them whole or not at all."""

import hashlib
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ssn_plugin.checkpoint.layout import check_switchable
from ssn_plugin.checkpoint.unpickling import Ignored, weights_only
from ssn_plugin.checkpoint.whole_file import whole_file
from ssn_plugin.errors import CheckpointError
from ssn_plugin.layers.radius import unwrapped_name


def read_checkpoint(path: str | os.PathLike, allow_pickle: bool = False) -> dict:
    """Read a checkpoint file to the CPU, by ``torch.load(weights_only=True)``.

    ``allow_pickle`` unpickles code too, for a file that is trusted.

    Raises:
        CheckpointError: If there is no such file, it is truncated or no checkpoint, or it needs
            code to be unpickled.
    """
    checkpoint = read_file(path, allow_pickle)
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path}: holds a {type(checkpoint).__name__}, expected a dict')
    return checkpoint


def read_file(path: str | os.PathLike, allow_pickle: bool = False) -> object:
    """Read what :func:`read_checkpoint` does, and what is no dict too."""
    path = os.fspath(path)
    if os.path.isdir(path):
        raise CheckpointError(f'{path}: is a folder, expected a checkpoint file')
    if not os.path.isfile(path):
        raise CheckpointError(f'{path}: no such file (looked for from {os.getcwd()})')
    with weights_only(allow_pickle):
        return torch.load(path, map_location='cpu')


def weights_entry(checkpoint: Mapping) -> str | None:
    """The entry of a checkpoint that holds its state dict; None if it is one itself."""
    for name in ('state_dict', 'model'):
        if isinstance(checkpoint.get(name), Mapping):
            return name
    found = [name for name, value in checkpoint.items() if _is_state(value)]
    return found[0] if len(found) == 1 else None


def state_in(checkpoint: Mapping) -> Mapping:
    """The state dict of a checkpoint as it stands there; what has none inside is its own."""
    entry = weights_entry(checkpoint)
    return checkpoint if entry is None else state_in(checkpoint[entry])


def weights_in(checkpoint: Mapping, path: str) -> OrderedDict[str, Tensor]:
    """The state dict of a checkpoint, without the names that wrappers add.

    Args:
        checkpoint: A state dict, or a dict with one under 'state_dict' (training scripts,
            mmengine), 'model' (torchvision's scripts) or whatever name, if there is no other; or
            with such a dict under 'state_dict' or 'model'.
        path: Where it is from, for the error.

    Raises:
        CheckpointError: If there are no weights in it, or none with values.
    """
    state = state_in(checkpoint)
    if not _is_state(state):
        several = [name for name, value in state.items() if _is_state(value)]
        held = f'several state dicts, {", ".join(several)}: save the one to take by itself'
        raise CheckpointError(f'{path}: holds {held if several else "no state dict of weights"}')
    for key, value in state.items():
        if value.is_meta:
            raise CheckpointError(f'{path}: {key} has no values: it was saved from the meta device')
        if value.layout != torch.strided:
            raise CheckpointError(f'{path}: {key} is a sparse tensor, expected a dense one')
    check_switchable(state, path)
    weights = OrderedDict((bare_name(key), value) for key, value in state.items())
    known = getattr(state, '_metadata', {})
    weights._metadata = {bare_name(name): value for name, value in known.items()}
    return weights


def meta_in(checkpoint: Mapping) -> Mapping:
    """What a checkpoint tells beside its weights, under ``meta``; nothing where that is no dict."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, Mapping) else {}


def _is_state(value: object) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def bare_name(name: str) -> str:
    """The name that a key of a state dict has without those that wrappers add."""
    return unwrapped_name(name).removeprefix('module.')


def md5_of(path: str | os.PathLike) -> str:
    """MD5 sum of a file in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def without_stand_ins(entries: Mapping) -> dict:
    """What of a file's entries was read whole: nothing of numpy, no log histories."""
    kept = {}
    for key, value in entries.items():
        if isinstance(value, Mapping):
            value = without_stand_ins(value)
        if not _holds_stand_in(value):
            kept[key] = value
    return kept


def _holds_stand_in(value: object) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(map(_holds_stand_in, value))
    return isinstance(value, Ignored)


def write_checkpoint(checkpoint: dict, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write a checkpoint to a temporary name beside its place and rename it.

    Raises:
        CheckpointError: If the file exists or cannot be written; then nothing is left behind.
    """
    path = Path(path)
    check_writable(path, overwrite)
    try:
        with whole_file(path) as temporary, open(temporary, 'wb') as file:
            # Given a path, torch.save would write its name into the file.
            torch.save(checkpoint, file)
    except (OSError, RuntimeError, pickle.PicklingError) as error:
        # torch's zip writer hides the error of the disk in a RuntimeError.
        cause = error
        while isinstance(cause, RuntimeError) and cause.__context__ is not None:
            cause = cause.__context__
        reason = getattr(cause, 'strerror', None) or ' '.join(str(error).split())[:200]
        raise CheckpointError(f'{path}: cannot be written: {reason}') from error


def check_writable(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Say before long work whether a file may be written.

    Raises:
        CheckpointError: If it exists, or its folder does not or is read-only.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f'{path}: is a folder, expected a file name')
    if path.exists() and not overwrite:
        raise CheckpointError(f'{path}: exists already; name another file or give --overwrite')
    if not path.parent.is_dir():
        raise CheckpointError(f'{path}: cannot be written: there is no folder {path.parent}')
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f'{path}: cannot be written: {path.parent} is read-only')
