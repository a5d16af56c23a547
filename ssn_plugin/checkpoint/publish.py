"""A training checkpoint as a small backbone file that tells what is in it."""

import ctypes
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ssn_plugin.checkpoint.candidates import recorded_candidates
from ssn_plugin.checkpoint.files import read_checkpoint, weights_entry, weights_in, write_checkpoint
from ssn_plugin.checkpoint.layout import backbone_of, describe
from ssn_plugin.checkpoint.release import released
from ssn_plugin.checkpoint.selection import Selected, histogram, selections
from ssn_plugin.checkpoint.traits import told_candidates, told_traits
from ssn_plugin.errors import CheckpointError
from ssn_plugin.version import __version__


class Published(NamedTuple):
    """What :func:`publish_backbone` did.

    Attributes:
        path: The file written.
        layout: What it holds, in words.
        selection: What every SSN and SN layer chose.
        left_out: Keys of weights that are not the backbone's.
        left_out_beside: Entries of the training checkpoint beside its weights.
    """

    path: Path
    layout: str
    selection: dict[str, Selected]
    left_out: tuple[str, ...]
    left_out_beside: tuple[str, ...]


def publish_backbone(
    source: str | os.PathLike, out: str | os.PathLike, allow_pickle: bool = False
) -> Published:
    """Write the backbone of a training checkpoint, alone, to a file with a hash in its name.

    The file holds ``state_dict``, in the names of the file, and ``meta`` with the version of
    this package, a description, the selection (layer -> normalizers of mean and variance) and,
    where the training told them, the candidates and the padding of the stem's pool. The name ends
    in the first 8 digits of the SHA-256 of the weights, as OpenMMLab's files do.

    Args:
        source: Checkpoint of a training of a classifier, detector or segmentor, or a released file.
        out: Name of the file to be, such as ``r50.pth``; it becomes ``r50-0123abcd.pth``.
        allow_pickle: Unpickle code in ``source``, which is then trusted.

    Raises:
        CheckpointError: If there are no norm layers in ``source``, or the file cannot be written.
    """
    checkpoint = read_checkpoint(source, allow_pickle)
    released(source)
    weights = weights_in(checkpoint, str(source))
    state, left_out = backbone_of(weights)
    for key, value in state.items():
        # torch.save writes the whole storage of a view into the file, so copy.
        state[key] = value.detach().clone().contiguous()
    layout = describe(state)
    if not layout.norms:
        raise CheckpointError(f'{source}: holds no norm layers')
    traits = told_traits(checkpoint)
    told = told_candidates(checkpoint)._replace(layers=recorded_candidates(state))
    chosen = selections(state, told)
    meta = {
        'ssn_plugin': __version__,
        'layout': str(layout),
        'selection': {name: tuple(selection) for name, selection in chosen.items()},
        'histogram': histogram(chosen),
        **traits,
    }
    out = Path(out)
    if out.suffix != '.pth':
        raise CheckpointError(f'{out}: expected a name that ends in .pth')
    path = out.with_name(f'{out.stem}-{_digest(state)[:8]}.pth')
    write_checkpoint({'meta': meta, 'state_dict': state}, path, overwrite=True)  # named by its hash
    entry = weights_entry(checkpoint)
    return Published(
        path,
        meta['layout'],
        chosen,
        left_out,
        () if entry is None else tuple(str(key) for key in checkpoint if key != entry),
    )


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values."""
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(key.encode())
        value = value.contiguous()
        digest.update(ctypes.string_at(value.data_ptr(), value.nbytes))  # numpy may be missing
    return digest.hexdigest()
