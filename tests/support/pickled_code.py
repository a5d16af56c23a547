"""Code that hides in a checkpoint file."""

import os


class Marker:
    """Pickles into a call that makes a file: what a malicious checkpoint would do."""

    def __init__(self, path: object) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f'touch "{self.path}"',)
