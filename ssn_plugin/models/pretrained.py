"""Loads the weights a backbone starts from and accounts for every key of them."""

import logging
import os
from collections.abc import Iterator

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import nn

from ssn_plugin.checkpoint.files import (
    CheckpointError,
    explain_load_error,
    read_checkpoint,
    weights_in,
    weights_only,
)
from ssn_plugin.checkpoint.layout import describe
from ssn_plugin.checkpoint.matching import check_match
from ssn_plugin.checkpoint.release import released
from ssn_plugin.checkpoint.selection import selections


def load_checkpoint(path: str, allow_pickle: bool = False) -> dict:
    """Read a checkpoint by file name, or by an address that mmengine knows.

    Args:
        path: A file, or an address such as ``https://...`` or ``bn2ssn://...``.
        allow_pickle: Unpickle code in it, which is then trusted.

    Returns:
        What it holds, on the CPU.

    Raises:
        CheckpointError: If there is none, it cannot be read without running code that is in it, or
            it bears the name of a released file and is another one.
    """
    if '://' not in path:
        path = os.path.expanduser(path)
        checkpoint = read_checkpoint(path, allow_pickle)
        released(path)
        return checkpoint
    with weights_only(allow_pickle):
        try:
            return CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
        except CheckpointError:
            raise
        except Exception as error:
            # A name unknown to the scheme, no network, what unpickling raises.
            raise explain_load_error(path, error) from error


def pretrained_entries(init_cfg: object) -> Iterator[dict]:
    """The entries of an ``init_cfg`` that load a checkpoint.

    Args:
        init_cfg: A dict, a list of dicts or None.
    """
    for entry in init_cfg if isinstance(init_cfg, list | tuple) else [init_cfg]:
        if isinstance(entry, dict) and entry.get('type') == 'Pretrained':
            yield entry


def check_pretrained(backbone: nn.Module, entry: dict) -> str:
    """See that a checkpoint fills a backbone: mmengine itself would only log what it does not.

    Args:
        backbone: With ``stem_padding``, the padding of its stem's pool.
        entry: Of :func:`pretrained_entries`.

    Returns:
        What the checkpoint brings, in one line.

    Raises:
        CheckpointError: Naming the missing, unexpected and misshapen keys, and the reason if it can
            be told.
    """
    path = entry['checkpoint']
    checkpoint = load_checkpoint(path)
    state = weights_in(checkpoint, path)
    prefix = entry.get('prefix')
    if prefix is not None:
        prefix = f'{prefix.removesuffix(".")}.'
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if not state:
            raise CheckpointError(f'{path}: holds nothing under prefix={entry["prefix"]!r}')
    own = backbone.state_dict()
    check_match(own, state, path)
    padding = (checkpoint.get('meta') or {}).get('stem_padding', backbone.stem_padding)
    if padding != backbone.stem_padding:
        print_log(
            f'SSNResNet: {path} was trained with a stem that pools with padding {padding}, this '
            f'backbone pools with {backbone.stem_padding}: set stem_padding={padding} in it',
            logger='current',
            level=logging.WARNING,
        )
    chosen = selections({key: value for key, value in state.items() if key in own})
    counters = sum(key.endswith('.num_batches_tracked') for key in own)  # released files have none
    decided = sum(None not in selection for selection in chosen.values())
    return (
        f'SSNResNet: all {len(own) - counters} weights and buffers filled from {path}, '
        f'a {describe(state)}; '
        f'{decided} of its {len(chosen)} switchable layers are decided and stay so'
    )
