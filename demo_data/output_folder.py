"""The folder a data set is written to: complete or not there, and never over something else."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

# Written last; a folder that has it is a finished demo data set.
RECORD_FILE = 'demo_data.json'


def check_integer(name: str, value: int, low: int, high: int) -> None:
    """Raise ValueError unless ``value`` is an integer from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f'{name} must be an integer from {low} to {high}, got {value!r}')


def is_there(out: Path, settings: dict[str, int | str], overwrite: bool) -> bool:
    """Whether ``out`` is the data set of these settings already.

    Raises:
        FileExistsError: it must not be written to.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise FileExistsError(f'{out} is a file; give the name of a folder')
    if not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / RECORD_FILE).read_text())['settings']
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(
            f'{out} is not empty and holds no demo data set; give another folder'
        ) from None
    if found == settings:
        return True
    if not overwrite:
        raise FileExistsError(
            f'{out} holds a demo data set with other settings {found}; '
            'replace it with overwrite (--overwrite), or give another folder'
        )
    return False


@contextmanager
def folder_moved_into_place(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place on success and vanishes on failure."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    except OSError as error:
        raise OSError(f'cannot write to {out.parent}: {error.strerror}') from error
    try:
        folder = workspace / 'new'
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(workspace / 'old')
        folder.rename(out)
    except BaseException:
        if (workspace / 'old').exists() and not out.exists():
            (workspace / 'old').rename(out)
        raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the bytes of the pictures."""
    return {name: version(name) for name in ('numpy', 'pillow', 'scikit-image')}


def write_record(folder: Path, settings: dict[str, int | str]) -> None:
    """Write what makes a folder a finished demo data set of these settings."""
    record = {'settings': settings, 'versions': library_versions()}
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + '\n')
