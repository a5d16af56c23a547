"""Whether the norm layers of a file are those of the model that it is loaded into."""

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from ssn_plugin.checkpoint.layout import norm_layers

_SWITCHABLE = {'SSN', 'SN'}
_REMEDIES = {
    ('BN', 'SSN'): 'name it as bn2ssn://{path}, which turns BatchNorm into SSN',
    ('SN', 'SSN'): 'name it as sn2ssn://{path}, which turns SN into SSN',
}


def norm_mismatch(
    own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: str, starts: bool = True
) -> str | None:
    """Tell of a part of a network whose norms a file lacks, as it has others there, and what to do.

    What loads a checkpoint in mmengine leaves such norms as they are, with a line in the log.

    ``starts`` says whether a training starts from the file, so that it may be converted.

    Returns:
        A text, or None: every part has norms of a kind that the file has there, or none.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN
        >>> from ssn_plugin.checkpoint.norm_kinds import norm_mismatch
        >>> ssn, bn = (torch.nn.ModuleDict({'neck': n}) for n in (SSN(4), torch.nn.BatchNorm2d(4)))
        >>> norm_mismatch(ssn.state_dict(), bn.state_dict(), 'a.pth').partition(': ')[0]
        'a.pth has 1 BN in neck, where the model has 1 SSN'
    """
    ours, theirs = _by_part(own), _by_part(loaded)
    for part, kinds in ours.items():
        others = theirs.get(part)
        if not others or kinds & others or not _SWITCHABLE & {*kinds, *others}:
            continue
        pair = (others.most_common(1)[0][0], kinds.most_common(1)[0][0])
        other = 'take the config that it was trained with'
        remedy = _REMEDIES.get(pair, other) if starts else other
        return (
            f'{path} has {_told(others)} in {part}, where the model has {_told(kinds)}: '
            f'{remedy.format(path=path)}'
        )
    return None


def _by_part(state: Mapping[str, Tensor]) -> dict[str, Counter]:
    found: dict[str, Counter] = {}
    for name, kind in norm_layers(state).items():
        found.setdefault(name.partition('.')[0], Counter())[kind] += 1
    return found


def _told(kinds: Counter) -> str:
    return ' and '.join(f'{count} {kind}' for kind, count in kinds.items())
