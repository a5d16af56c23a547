"""Whether a file's weights fill a backbone: every key accounted for, or one line that says why."""

import re
from collections.abc import Mapping

from torch import Tensor

from ssn_plugin.checkpoint.layout import Layout, describe, is_classifier, shown
from ssn_plugin.errors import CheckpointError

_ADVICE = {
    'BN': "; take it as 'bn2ssn://{path}' to start from BatchNorm weights",
    'SN': "; take it as 'sn2ssn://{path}' to start from SN's importance ratios",
}


def check_match(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: str) -> None:
    """Account for every key of a backbone and of the file it is to be filled from.

    Left alone are the file's classifier, the stages a shorter backbone does not have, and
    ``num_batches_tracked``, which files of the authors' release do not count. The shape of what a
    norm holds counts as the same when it differs in dimensions of size one: the release keeps
    (1, C, 1, 1).

    Args:
        own: The backbone's state dict.
        loaded: The file's.
        path: Where it is from, for the error.

    Raises:
        CheckpointError: One line that tells apart the wrong architecture, the wrong norm, missing,
            unexpected and misshapen keys.
    """
    stages = {key.split('.')[0] for key in own}
    loaded = {
        key: value
        for key, value in loaded.items()
        if not is_classifier(key)
        and not (re.match(r'layer[1-4]\.', key) and key.split('.')[0] not in stages)
    }
    missing = [key for key in own if key not in loaded and not key.endswith('.num_batches_tracked')]
    unexpected = [key for key in loaded if key not in own]
    misshapen = [
        f'{key} is {list(loaded[key].shape)}, expected {list(own[key].shape)}'
        for key in own
        if key in loaded and not _same_shape(own[key], loaded[key])
    ]
    if not (missing or unexpected or misshapen):
        return
    parts = [
        f'{what} {shown(keys)}'
        for what, keys in (
            ('missing', missing), ('unexpected', unexpected), ('of another shape', misshapen)
        )
        if keys
    ]  # fmt: skip
    raise CheckpointError(
        f'{path}: does not fill the backbone{_reason(own, loaded, path)}: {"; ".join(parts)}'
    )


def _same_shape(own: Tensor, loaded: Tensor) -> bool:
    if own.dim() > 1:  # a convolution
        return own.shape == loaded.shape
    return [size for size in own.shape if size != 1] == [size for size in loaded.shape if size != 1]


def _reason(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: str) -> str:
    """What is wrong as a whole, where it can be told."""
    expected = describe(own)
    if not any(key.startswith('layer1.') for key in loaded):
        prefixes = {key.split('.layer1.')[0] for key in loaded if '.layer1.' in key}
        if len(prefixes) == 1:
            return f" (a ResNet lies under '{prefixes.pop()}.': set prefix to it in init_cfg)"
        return ' (it holds no ResNet)'
    got = describe(loaded)
    if _network(got) != _network(expected):
        return f' (it holds a {got}, expected a {expected})'
    if got.norm != expected.norm:
        advice = _ADVICE.get(got.norm, '') if expected.norm == 'SSN' else ''
        return f' (it holds {got.norm} layers, expected {expected.norm}{advice.format(path=path)})'
    return ''


def _network(layout: Layout) -> tuple:
    return layout.depth, layout.deep_stem, layout.avg_down
