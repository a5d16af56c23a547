"""The model of a config, and the weights of a checkpoint in it."""

import copy
import os
import re
from collections.abc import Mapping

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from ssn_plugin.checkpoint.layout import shown
from ssn_plugin.checkpoint.unpickling import weights_only
from ssn_plugin.errors import CheckpointError, InputError, in_one_line
from ssn_plugin.jobs.explained_errors import building


def model_settings(config: Config) -> dict:
    """The model's part of a config, with its data preprocessor, wherever that stands.

    mmpretrain has ``data_preprocessor`` beside ``model``, and the Runner puts it there.
    """
    settings = copy.deepcopy(config.model)
    if config.get('data_preprocessor') is not None:
        settings.setdefault('data_preprocessor', copy.deepcopy(config.data_preprocessor))
    return settings


def build_model(config: Config, path: str | os.PathLike) -> nn.Module:
    """Build the model of a config in the scope that the config names.

    Raises:
        InputError: If the config has no model, or it cannot be built.
    """
    if not config.get('model'):
        raise InputError(f'config: {path} has no model')
    init_default_scope(config.get('default_scope', 'mmengine'))
    try:
        with weights_only():  # some parts read files while they are built
            return MODELS.build(model_settings(config))
    except Exception as error:
        # The registry raises what the missing package or the model's own code raises, and puts a
        # sentence before it for each class that it was building.
        reason = re.sub(r'class `\w+` in \S+: ', '', in_one_line(error))
        modules = building(error)
        within = f' in {modules}' if modules else ''
        raise InputError(f'config: cannot build the model of {path}{within}: {reason}') from error


def load_by_name(
    model: nn.Module, state: Mapping[str, Tensor], checkpoint: str, config: str
) -> tuple[list[str], list[str]]:
    """As :func:`load_strictly`, but return the missing and the unexpected keys."""
    try:
        return model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = ' '.join(str(error).splitlines()[1:2]).strip()
        raise CheckpointError(f'{checkpoint}: does not fit {config}: {reason}') from error


def load_strictly(
    model: nn.Module, state: Mapping[str, Tensor], checkpoint: str, config: str
) -> None:
    """Fill a model; every key of it and of the state dict has to have its counterpart.

    Raises:
        CheckpointError: Naming missing and unexpected keys, or the first of another shape.
    """
    missing, unexpected = load_by_name(model, state, checkpoint, config)
    parts = [
        f'{what} {shown(keys)}'
        for what, keys in (('missing', missing), ('unexpected', unexpected))
        if keys
    ]
    if parts:
        raise CheckpointError(f'{checkpoint}: does not fit {config}: {"; ".join(parts)}')
