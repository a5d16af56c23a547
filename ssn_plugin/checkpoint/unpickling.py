"""What ``torch.load`` may make of a file: weights and what stands beside them, never code.

Where a framework reads a checkpoint is not ours to say: its keys have many names, and some of its
classes read files while they are built. So ``torch.load`` itself is replaced, for a block or for
the whole process of a tool.
"""

import contextlib
import errno
import functools
import importlib
import os
import pickle
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import torch

from ssn_plugin.errors import CheckpointError
from ssn_plugin.torch_versions import allow_only

ALLOW_PICKLE = 'SSN_ALLOW_PICKLE'
# Both variables of torch are overruled: ALLOW_PICKLE alone says whether code may run.
_FORCES = ('TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')
_load = torch.load

_GETATTR = 'builtins.getattr'
_CONFIG_DICT = 'mmengine.config.config.ConfigDict'
_HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
# These are harmless with any argument; an empty array needs bytes.
_PLAIN = {f'builtins.{each.__name__}': each for each in (bytes, slice)}
# What a training run of mmengine (log histories, meta information of a data set) or an old script
# (a best accuracy as a numpy scalar) puts beside the weights.
_BESIDE_WEIGHTS = (
    _GETATTR,  # a log history names its statistics by it
    _CONFIG_DICT,
    _HISTORY,
    *(
        f'numpy.{core}.multiarray.{name}'
        for core in ('core', '_core')
        for name in ('_reconstruct', 'scalar')
    ),
    'numpy.ndarray',
    'numpy.dtype',
)


class Ignored:
    """Base of what stands for things beside weights, so that nothing of them is ever called."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _inert() -> dict[str, object]:
    """Things that do nothing, for everything but a dict."""
    stand_ins = {name: type(name.rpartition('.')[2], (Ignored,), {}) for name in _BESIDE_WEIGHTS}
    return {**stand_ins, **_PLAIN, _CONFIG_DICT: dict}


@functools.cache
def _real() -> dict[str, object]:
    """The things themselves, as a run that is resumed needs them; as many as are installed."""
    found = {path: each for path in _BESIDE_WEIGHTS if (each := _installed(path))} | _PLAIN
    found[_GETATTR] = _statistic_of_a_history
    if dtype := found.get('numpy.dtype'):
        classes = {type(dtype(code)) for code in '?bBhHiIlLqQefdgFDGSUVOMm'}
        found |= {f'{each.__module__}.{each.__name__}': each for each in classes}
    return found


def _installed(path: str) -> object | None:
    # numpy renamed numpy.core to numpy._core and keeps the old name as deprecated, so the new one
    # is tried first.
    for place in (path.replace('.core.', '._core.'), path.replace('._core.', '.core.')):
        module, _, name = place.rpartition('.')
        with contextlib.suppress(ImportError):
            return getattr(importlib.import_module(module), name)
    return None


def _statistic_of_a_history(owner: object, name: object) -> Callable:
    """Stand for ``getattr``, by which one can reach anything."""
    if owner is not _real().get(_HISTORY) or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'GLOBAL {_GETATTR} was not allowed')
    return getattr(owner, name)


@contextlib.contextmanager
def weights_only(allow_pickle: bool = False) -> Iterator[None]:
    """Make every ``torch.load`` inside refuse files that need code to be unpickled.

    This holds even for libraries that call it with ``weights_only=False``. Known objects beside the
    weights, such as log histories and numpy arrays, are replaced by empty stand-ins.

    Args:
        allow_pickle: Trust the file. ``SSN_ALLOW_PICKLE=1`` in the environment does the same.

    Example:
        >>> import tempfile, torch
        >>> from ssn_plugin.checkpoint.unpickling import weights_only
        >>> file = tempfile.TemporaryFile()
        >>> torch.save({'a': torch.ones(1)}, file)
        >>> _ = file.seek(0)
        >>> with weights_only():
        ...     torch.load(file, weights_only=False)
        {'a': tensor([1.])}
    """
    before = torch.load
    _put(_reader(_inert(), allow_pickle))
    try:
        yield
    finally:
        _put(before)


def refuse_code() -> None:
    """Make ``torch.load`` refuse code until this process ends, whoever calls it and however.

    Log histories and arrays, without which no run of mmengine can be resumed, are themselves.
    """
    _put(_reader(_real(), whole_run=True))


def _put(load: Callable) -> None:
    torch.load = torch.serialization.load = load


def _reader(
    allowed: Mapping[str, object], allow_pickle: bool = False, whole_run: bool = False
) -> Callable:
    """A ``torch.load`` that makes weights and what is allowed."""

    @functools.wraps(_load)
    def load(
        f: str | os.PathLike | BinaryIO,
        map_location: object = None,
        pickle_module: object = None,
        *,
        weights_only: bool | None = None,
        **kwargs: object,
    ) -> object:
        path = os.fspath(f) if isinstance(f, str | os.PathLike) else getattr(f, 'name', 'a stream')
        trusted = allow_pickle or os.environ.get(ALLOW_PICKLE, '0') not in ('', '0')
        try:
            with _unforced():
                if trusted:
                    return _load(f, map_location, pickle_module, weights_only=False, **kwargs)
                _refuse_archive(f, path)
                # torch warns of a pickle's protocol before it says what is wrong with it.
                with allow_only(allowed), warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    read = _load(f, map_location, weights_only=True, **kwargs)
        except (CheckpointError, FileNotFoundError):
            raise
        except Exception as error:
            # The zip reader, the unpickler and the storages each raise other errors.
            raise explain_load_error(str(path), error) from error
        return _without_program(read) if whole_run else read

    return load


@contextlib.contextmanager
def _unforced() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in _FORCES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _refuse_archive(f: object, path: object) -> None:
    """Old archives are unpacked to the disk before they are read, TorchScript is a program."""
    opened = contextlib.nullcontext(f) if hasattr(f, 'read') else open(f, 'rb')  # noqa: SIM115
    with opened as file:
        start = file.tell()
        try:
            kind = _archive(file)
        finally:
            file.seek(start)
    if kind:
        raise CheckpointError(f'{path}: refused: is {kind}, expected a checkpoint of torch.save()')


def _archive(file: BinaryIO) -> str | None:
    start = file.tell()
    block = file.read(tarfile.BLOCKSIZE)
    if block.startswith(b'PK'):
        file.seek(start)
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
            if any(name.endswith('/constants.pkl') for name in archive.namelist()):
                return 'a TorchScript archive'
        return None
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, 'surrogateescape')
        return 'a tar archive'
    return None


def _without_program(checkpoint: object) -> object:
    """Leave out the text of a config that mmengine would run when a run is resumed."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    if isinstance(meta, dict):
        meta.pop('config', None)
    return checkpoint


def explain_load_error(path: str, error: Exception) -> CheckpointError:
    """Turn what ``torch.load`` raised into one line that says what is wrong with the file."""
    text = ' '.join(str(error).split())
    # A text file whose first letter happens to be the code of the GLOBAL instruction gives this
    # error too, but what it names is empty or has several words, so the pattern does not match.
    wanted = re.search(r'GLOBAL ([\w.]*\w) (was|whose)', text)
    if isinstance(error, pickle.UnpicklingError) and wanted and not _ends_early(path):
        return CheckpointError(
            f'{path}: refused, because reading it would run code: it holds a pickled {wanted[1]} '
            f'and not weights alone; if you trust it, set {ALLOW_PICKLE}=1 or give a tool '
            '--allow-pickle'
        )
    if 'invalid load key' in text or 'Unsupported operand' in text:
        return CheckpointError(f'{path}: not a checkpoint of torch')
    # In a file that ends early the zip reader, the unpickler and the storages raise different
    # errors; one is that they seek to before its beginning.
    of_disk = isinstance(error, OSError) and error.errno != errno.EINVAL
    if isinstance(error, EOFError) or not (of_disk or '://' in path):
        return CheckpointError(f'{path}: truncated, or not a checkpoint of torch')
    said = f'{type(error).__name__}: {text[:200]}'.removesuffix(': ')
    return CheckpointError(f'{path}: cannot be read: {said}')


def _ends_early(path: str) -> bool:
    """Whether a file of torch's old format ends within its pickles, maybe amid a type's name."""
    try:
        with open(path, 'rb') as file:
            if file.peek(2)[:2] == b'PK':  # a zip file, whose reader reports a missing end itself
                return False
            for _ in range(5):  # magic number, protocol, system, what was saved, keys of storages
                for _ in pickletools.genops(file):
                    pass
                if not file.peek(1):
                    break
    except OSError:  # the name is an address
        return False
    except ValueError:
        return True
    return False
