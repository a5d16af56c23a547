"""Files that are written whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside a file, renamed to it once the block has ended without an error.

    Args:
        path: File to write; its folder exists.

    Yields:
        The temporary name, which ends in .tmp.

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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        # A temporary file is private; this one is to have the permissions of any new file.
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
