"""Importance ratios of what a user names: a checkpoint, a work dir, or a config with weights."""

import os
import re
from pathlib import Path

from ssn_plugin.analysis.layer_ratios import (
    LayerRatios,
    layer_ratios,
    layer_ratios_of_state,
)
from ssn_plugin.checkpoint.files import read_checkpoint, weights_in
from ssn_plugin.checkpoint.layout import shown
from ssn_plugin.checkpoint.traits import told_candidates
from ssn_plugin.checkpoint.unpickling import weights_only
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.configs import load_config
from ssn_plugin.jobs.last_checkpoint import last_checkpoint
from ssn_plugin.jobs.trained_model import build_model, load_by_name
from ssn_plugin.models.pretrained import load_checkpoint


def rows_of(source: str, allow_pickle: bool = False) -> list[LayerRatios]:
    """Importance ratios of what a user names.

    Args:
        source: A checkpoint file or an address that mmengine knows; a work dir, of which the last
            checkpoint is taken; ``CONFIG.py:CHECKPOINT``, of which the model is built and the
            checkpoint loaded; or ``CONFIG.py`` alone with the weights it starts from.
        allow_pickle: Unpickle code in a checkpoint, which is then trusted.

    Raises:
        InputError: If there is no such thing, or no SSN or SN layer in it.
        CheckpointError: If a checkpoint cannot be read.
    """
    config, colon, checkpoint = source.partition('.py:')
    if colon:
        rows = _of_config(f'{config}.py', checkpoint, allow_pickle)
    elif source.endswith('.py'):
        rows = _of_config(source, None, allow_pickle)
    else:
        file = _last_checkpoint(Path(source)) if os.path.isdir(source) else source
        rows = _of_checkpoint(file, allow_pickle)
    if not rows:
        raise InputError(f'{source}: has no SSN or SN layers')
    return rows


def _last_checkpoint(folder: Path) -> str:
    """The checkpoint that a work dir names as its last, also where the folder has been moved."""
    note = last_checkpoint(folder)
    if note is None:
        raise InputError(
            f'{folder}: has no last_checkpoint, expected a work dir whose training has saved one'
        )
    moved = str(folder / Path(note).name)
    # Not of pathlib, which raises for a name that is too long.
    return note if os.path.isfile(note) or not os.path.isfile(moved) else moved


def _of_checkpoint(path: str, allow_pickle: bool) -> list[LayerRatios]:
    reads = load_checkpoint if '://' in path else read_checkpoint
    checkpoint = reads(path, allow_pickle)
    state = weights_in(checkpoint, path)
    return layer_ratios_of_state(state, told_candidates(checkpoint))


def _of_config(path: str, checkpoint: str | None, allow_pickle: bool) -> list[LayerRatios]:
    config = load_config(path)
    model = build_model(config, path)
    checkpoint = checkpoint or config.get('load_from')
    if checkpoint is None:
        if not re.search(r'\bPretrained\b', str(config.model.to_dict())):
            raise InputError(
                f'{path}: names no weights, neither by load_from nor by init_cfg; expected '
                f'{path}:CHECKPOINT'
            )
        with weights_only(allow_pickle):
            model.init_weights()
        return layer_ratios(model)
    reads = load_checkpoint if '://' in checkpoint else read_checkpoint
    state = weights_in(reads(checkpoint, allow_pickle), checkpoint)
    rows = {row.layer for row in layer_ratios(model)}
    missing, _ = load_by_name(model, state, checkpoint, path)
    random = [key for key in missing if key.endswith('.mean_weight') and key[:-12] in rows]
    if random:
        raise CheckpointError(f'{checkpoint}: does not fit {path}: it lacks {shown(random)}')
    return layer_ratios(model)
