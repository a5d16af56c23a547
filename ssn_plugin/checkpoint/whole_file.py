"""The one way to write a file: it is there whole or not at all."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

INCOMPLETE = '.incomplete'  # suffix of a file that is still being written


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name beside a file; once it is written and on the disk, rename it.

    Whoever reads ``path`` meanwhile, or after a kill, a full disk or a power failure, finds the
    file that was there before. A killed process leaves its temporary file behind.

    Args:
        path: File to write; its folder exists.

    Yields:
        The temporary name, ``path`` with a random part and ``.incomplete`` after it. The block
        writes the file of that name and closes it.

    Raises:
        OSError: With the name of ``path``, if the file cannot be written or the disk does not
            confirm it; then nothing incomplete is left behind.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ssn_plugin.checkpoint.whole_file import whole_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> with whole_file(folder / 'a.txt') as temporary:
        ...     _ = temporary.write_text('whole')
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    path = Path(path)
    # The name has a random part, because two processes may write the same file.
    temporary = path.with_name(f'{path.name}.{secrets.token_hex(4)}{INCOMPLETE}')
    try:
        yield temporary
        with open(temporary, 'r+b') as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # Name the file that the user asked for: a full disk names none, other errors the
        # temporary one.
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk, where the system lets a program ask for that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folder; others may be closed to this user
        return
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems have no fsync; EIO is a broken disk
        if error.errno == errno.EIO:
            raise
    finally:
        os.close(handle)
