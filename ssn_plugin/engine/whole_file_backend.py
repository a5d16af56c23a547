"""Files that are there whole or not at all, for mmengine's checkpoints."""

import contextlib
import os
from collections.abc import Iterator

from mmengine.fileio.backends import LocalBackend

from ssn_plugin.checkpoint.whole_file import whole_file


class WholeFileBackend(LocalBackend):
    """mmengine's backend for local files, which writes them whole."""

    _later: list | None = None

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write bytes into a folder that is made where it is missing."""
        os.makedirs(os.path.dirname(filepath) or '.', exist_ok=True)
        with whole_file(filepath) as temporary:
            temporary.write_bytes(obj)

    def put_text(self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8') -> None:
        """Write text as :meth:`put` does bytes."""
        self.put(obj.encode(encoding), filepath)

    def remove(self, filepath: str | os.PathLike) -> None:
        """Remove a file, or remember it inside :meth:`collecting_removals`."""
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
