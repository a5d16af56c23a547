"""Builds the model of a config before a run, and tells in one line what is wrong with it."""

import difflib
import os
import re
from collections.abc import Mapping

from mmengine.config import Config
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope
from torch import nn

from ssn_plugin.analysis.config_entries import as_list, norm_configs, type_name
from ssn_plugin.checkpoint.files import weights_in
from ssn_plugin.checkpoint.norm_kinds import norm_mismatch
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.trained_model import build_model
from ssn_plugin.models.resnet import SSNResNetMixin

_COMMON_NORMS = ('SSN', 'SyncSSN', 'SN', 'BN', 'SyncBN', 'GN', 'LN')


def checked_model(config: Config, path: str | os.PathLike) -> nn.Module | None:
    """Build the model of a config, if it has one, once the types of its norm layers are known.

    Raises:
        InputError: If it cannot be built.
    """
    if not config.get('model'):
        return None
    init_default_scope(config.get('default_scope', 'mmengine'))
    with MODELS.switch_scope_and_registry(None) as registry:
        for key, norm in norm_configs(config.model, 'model'):
            kind = norm.get('type')
            if isinstance(kind, str) and not _is_registered(registry, kind):
                close = difflib.get_close_matches(kind, _COMMON_NORMS, 3, 0.4) or _COMMON_NORMS
                raise InputError(
                    f'{key}.norm_cfg.type: got {kind!r}, expected a registered norm layer, such as '
                    f'{", ".join(close)}; where it is one, name its module in custom_imports'
                )
    return build_model(config, path)


def check_constructor(config: Config) -> None:
    """See that the constructor of the optimizer is one, in the scope that the config names.

    Raises:
        InputError: If not.
    """
    wrapper = config.get('optim_wrapper') or {}
    name = wrapper.get('constructor', 'SSNOptimWrapperConstructor')
    if isinstance(name, type):
        return
    with OPTIM_WRAPPER_CONSTRUCTORS.switch_scope_and_registry(None) as registry:
        if not isinstance(name, str) or not _is_registered(registry, name):
            raise InputError(
                f"optim_wrapper.constructor: got {name!r}, expected 'SSNOptimWrapperConstructor', "
                "or mmengine's own, 'DefaultOptimWrapperConstructor'; where it is another, name "
                'its module in custom_imports'
            )


def _is_registered(registry, kind: str) -> bool:
    try:
        return registry.get(kind) is not None
    except (ImportError, KeyError):  # the scope's package is not installed
        return False


def check_norms(model: nn.Module, name: str, path: str, checkpoint: Mapping) -> None:
    """See that a file has norms of the kind that a model has, part by part.

    Args:
        model: The whole model.
        name: ``checkpoint``, the argument of a test, or the entry of the config that names the
            file. For ``model.backbone.init_cfg.checkpoint`` it is that of ``model.backbone`` alone.
        path: The file.
        checkpoint: What it holds.

    Raises:
        InputError: If not, with what to do.
    """
    try:
        loaded = weights_in(checkpoint, path)
    except CheckpointError:
        return  # it is no state dict, so its reader expects something else
    own = model.state_dict()
    found = re.match(r'model\.(.+?)\.(init_cfg|pretrained)\b', name)
    if found:
        part = model.get_submodule(found[1])
        if isinstance(part, SSNResNetMixin):
            return  # it accounts for every key itself, and takes files of more kinds
        # The file holds a backbone, or a whole model with a backbone in it.
        loaded = {key.removeprefix('backbone.'): value for key, value in loaded.items()}
        loaded = {f'{found[1]}.{key}': value for key, value in loaded.items()}
        own = {key: value for key, value in own.items() if key.startswith(f'{found[1]}.')}
    told = norm_mismatch(own, loaded, path, starts=name != 'checkpoint')
    if told:
        raise InputError(f'{name}: {told}')


def start_options(config: Config) -> list[str]:
    """KEY=VALUE pairs that add SSNStartHook to a config that imports this package without it."""
    imports = as_list((config.get('custom_imports') or {}).get('imports'))
    hooks = [*as_list(config.get('custom_hooks')), *(config.get('default_hooks') or {}).values()]
    present = any(hook and type_name(hook) == 'SSNStartHook' for hook in hooks)
    return (
        []
        if present or 'ssn_plugin' not in imports
        else ['default_hooks.ssn_start.type=SSNStartHook']
    )
