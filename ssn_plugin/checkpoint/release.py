"""The checkpoints that the authors of SSN released: their sums, and the one name that is known."""

import os
from typing import NamedTuple

from ssn_plugin.checkpoint.files import md5_of
from ssn_plugin.errors import CheckpointError


class Release(NamedTuple):
    """One released ResNet-50 + SSN.

    Attributes:
        batch: GPUs and images per GPU of its training.
        top1: ImageNet top-1 accuracy in percent, as the authors print it.
        name: File name, where it is known.
    """

    batch: tuple[int, int]
    top1: float
    name: str | None = None


# Source: the authors' release page.
RELEASES = {
    '5c9fb111577b040e62461db51ffce69b': Release((8, 32), 77.25),
    'd7085632529a9b1945a28a4d3bf4cacb': Release((8, 16), 76.98),
    'af85a39920644421fc48e216aba6ff0e': Release((8, 8), 76.75),
    '949d4bd54a7c63a3371b941eb4d3ea69': Release((8, 4), 76.07),
    'dadb0f1a0c49c31aedd6cb83d4996a03': Release((8, 2), 75.85, 'ssn_8x2_75.848.pth'),
}


def released(path: str | os.PathLike) -> Release | None:
    """Which release a file is, by its MD5 sum; None if it is none of them.

    Raises:
        CheckpointError: If it bears the name of a released file but is another one.
    """
    found = md5_of(path)
    name = os.path.basename(path)
    for md5, release in RELEASES.items():
        if release.name == name and found != md5:
            raise CheckpointError(
                f'{path}: MD5 is {found}, but the released {name} has {md5}: '
                'download it again, or give the file another name if it is one of your own'
            )
    return RELEASES.get(found)
