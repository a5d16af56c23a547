"""Reads checkpoint files without running code in them, and writes them whole or not at all."""

import contextlib
import errno
import hashlib
import os
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ssn_plugin.checkpoint.whole_file import whole_file
from ssn_plugin.errors import CheckpointError
from ssn_plugin.torch_versions import allow_stand_ins

ALLOW_PICKLE = 'SSN_ALLOW_PICKLE'


class _Ignored:
    """Base of what stands for things beside weights, so that nothing of them is ever called."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What a training run of mmengine (log histories) or an old script (a best accuracy as a numpy
# scalar) puts beside the weights. They become inert objects here.
_BESIDE_WEIGHTS = (
    'builtins.getattr',
    'mmengine.logging.history_buffer.HistoryBuffer',
    *(
        f'numpy.{core}.multiarray.{name}'
        for core in ('core', '_core')
        for name in ('_reconstruct', 'scalar')
    ),
    'numpy.ndarray',
    'numpy.dtype',
)
# A class for each, under its name.
_STAND_INS = [
    type(name.rpartition('.')[2], (_Ignored,), {'__module__': name.rpartition('.')[0]})
    for name in _BESIDE_WEIGHTS
]


@contextlib.contextmanager
def weights_only(allow_pickle: bool = False) -> Iterator[None]:
    """Make every ``torch.load`` inside refuse files that need code to be unpickled.

    It also binds libraries that would fall back to unpickling, and overrules
    ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD``.

    Args:
        allow_pickle: Trust the file. ``SSN_ALLOW_PICKLE=1`` in the environment does the same.
    """
    if allow_pickle or os.environ.get(ALLOW_PICKLE, '0') not in ('', '0'):
        with _environment(
            {'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '1', 'TORCH_FORCE_WEIGHTS_ONLY_LOAD': None}
        ):
            yield
        return
    with (
        _environment(
            {'TORCH_FORCE_WEIGHTS_ONLY_LOAD': '1', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': None}
        ),
        allow_stand_ins(_STAND_INS),
    ):
        yield


@contextlib.contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}

    def put(pairs: dict[str, str | None]) -> None:
        for name, value in pairs.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


def explain_load_error(path: str, error: Exception) -> CheckpointError:
    """Turn what ``torch.load`` raised into one line that says what is wrong with the file.

    Args:
        path: File or address.
        error: What was raised.
    """
    text = ' '.join(str(error).split())
    # A text whose first letter means such an instruction names no type, or one of several words.
    wanted = re.search(r'GLOBAL ([\w.]*\w) (was|whose)', text)
    if isinstance(error, pickle.UnpicklingError) and wanted and not _ends_early(path):
        return CheckpointError(
            f'{path}: refused, because reading it would run code: it holds a pickled {wanted[1]} '
            f'and not weights alone; if you trust it, set {ALLOW_PICKLE}=1 or give a tool '
            '--allow-pickle'
        )
    if 'invalid load key' in text or 'Unsupported operand' in text:
        return CheckpointError(f'{path}: not a checkpoint of torch')
    # A file that ends early makes readers of zip, pickle and storages fail in ways of their own;
    # seeking before its beginning is one.
    of_disk = isinstance(error, OSError) and error.errno != errno.EINVAL
    if isinstance(error, EOFError) or not (of_disk or '://' in path):
        return CheckpointError(f'{path}: truncated, or not a checkpoint of torch')
    said = f'{type(error).__name__}: {text[:200]}'.removesuffix(': ')
    return CheckpointError(f'{path}: cannot be read: {said}')


def _ends_early(path: str) -> bool:
    """Whether a file of torch's old format ends within its pickles, maybe amid a type's name."""
    try:
        with open(path, 'rb') as file:
            if file.peek(2)[:2] == b'PK':  # a zip, which fails in another way
                return False
            for _ in range(5):  # magic number, protocol, system, what was saved, keys of storages
                for _ in pickletools.genops(file):
                    pass
                if not file.peek(1):
                    break
    except OSError:  # an address
        return False
    except ValueError:
        return True
    return False


def read_checkpoint(path: str | os.PathLike, allow_pickle: bool = False) -> dict:
    """Read a checkpoint file to the CPU, by ``torch.load(weights_only=True)``.

    Args:
        path: The file.
        allow_pickle: Unpickle code too, for a file that is trusted.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: If there is no such file, it is truncated or no checkpoint, or it needs
            code to be unpickled.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise CheckpointError(f'{path}: is a folder, expected a checkpoint file')
    if not os.path.isfile(path):
        raise CheckpointError(f'{path}: no such file (looked for from {os.getcwd()})')
    with weights_only(allow_pickle):
        try:
            checkpoint = torch.load(path, map_location='cpu')
        except Exception as error:
            # Zip reader, unpickler and storages each raise errors of their own.
            raise explain_load_error(path, error) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path}: holds a {type(checkpoint).__name__}, expected a dict')
    return checkpoint


def weights_entry(checkpoint: Mapping) -> str | None:
    """The entry of a checkpoint that holds its state dict; None if it is one itself.

    Args:
        checkpoint: As for :func:`weights_in`.
    """
    for name in ('state_dict', 'model'):
        if isinstance(checkpoint.get(name), Mapping):
            return name
    return None


def weights_in(checkpoint: Mapping, path: str) -> OrderedDict[str, Tensor]:
    """The state dict of a checkpoint, without the ``module.`` of a parallel wrapper.

    Args:
        checkpoint: A state dict, or a dict with one under 'state_dict' (training scripts, mmengine)
            or 'model' (torchvision's scripts).
        path: Where it is from, for the error.

    Raises:
        CheckpointError: If there are no weights in it.
    """
    entry = weights_entry(checkpoint)
    state = checkpoint if entry is None else checkpoint[entry]
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f'{path}: holds no state dict of weights')
    return OrderedDict((key.removeprefix('module.'), value) for key, value in state.items())


def md5_of(path: str | os.PathLike) -> str:
    """MD5 sum of a file in hexadecimal.

    Args:
        path: The file.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def without_stand_ins(entries: Mapping) -> dict:
    """What of a file's entries was read whole: nothing of numpy, no log histories.

    Args:
        entries: Entries beside the weights, nested or not; those that hold what was not read are
            left out.
    """
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
    return isinstance(value, _Ignored)


def write_checkpoint(checkpoint: dict, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write a checkpoint to a temporary name beside its place and rename it.

    Args:
        checkpoint: What to write.
        path: Where to.
        overwrite: Replace a file of that name.

    Raises:
        CheckpointError: If the file exists or cannot be written; then nothing is left behind.
    """
    path = Path(path)
    check_writable(path, overwrite)
    try:
        with whole_file(path) as temporary, open(temporary, 'wb') as file:
            torch.save(checkpoint, file)  # given a name, it would write that into the file
    except (OSError, RuntimeError, pickle.PicklingError) as error:
        # The zip writer raises a RuntimeError of its own over what the disk said.
        cause = error
        while isinstance(cause, RuntimeError) and cause.__context__ is not None:
            cause = cause.__context__
        reason = getattr(cause, 'strerror', None) or ' '.join(str(error).split())[:200]
        raise CheckpointError(f'{path}: cannot be written: {reason}') from error


def check_writable(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Say before long work whether a file may be written.

    Args:
        path: The file to be.
        overwrite: Whether a file of that name may be replaced.

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
