"""Files that are there whole or not at all, for mmengine's checkpoints."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mmengine.fileio.backends import LocalBackend

INCOMPLETE = '.incomplete'  # at the end of the name of a file that is being written


def replace_file(path: str | os.PathLike, content: bytes) -> None:
    """Write a file beside its place, wait for the disk, and put it there.

    Whoever reads ``path`` meanwhile, or after a kill, a full disk or a power failure, finds the
    file that was there before. A killed process may leave ``path`` with ``.incomplete`` after it
    behind, which the next attempt overwrites.

    Args:
        path: The file.
        content: What it is to hold.

    Raises:
        OSError: If it cannot be written or the disk does not confirm it; then nothing incomplete is
            left behind.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> replace_file(f'{folder.name}/note', b'whole')
        >>> os.listdir(folder.name)
        ['note']
    """
    path = Path(path)
    temporary = path.with_name(f'{path.name}{INCOMPLETE}')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk names none
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


class WholeFileBackend(LocalBackend):
    """mmengine's backend for local files, with :func:`replace_file` for writing."""

    _later: list | None = None

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write bytes.

        Args:
            obj: The bytes.
            filepath: The file; its folder is made where it is missing.
        """
        os.makedirs(os.path.dirname(filepath) or '.', exist_ok=True)
        replace_file(filepath, obj)

    def put_text(self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8') -> None:
        """Write text.

        Args:
            obj: The text.
            filepath: The file; its folder is made where it is missing.
            encoding: Of the text.
        """
        self.put(obj.encode(encoding), filepath)

    def remove(self, filepath: str | os.PathLike) -> None:
        """Remove a file, or remember it inside :meth:`collecting_removals`.

        Args:
            filepath: The file.
        """
        if self._later is None:
            super().remove(filepath)
        else:
            self._later.append(filepath)

    @contextlib.contextmanager
    def collecting_removals(self) -> Iterator[list]:
        """Remove nothing meanwhile; the list says what should have been."""
        self._later = []
        try:
            yield self._later
        finally:
            self._later = None
