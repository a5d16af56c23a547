"""A decided model's config for the framework alone, as far as its norms can be told in norm_cfg."""

from collections.abc import Iterator, Mapping

from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

from ssn_plugin.analysis.config_entries import as_list, type_name
from ssn_plugin.checkpoint.selection import Selected, histogram
from ssn_plugin.errors import InputError
from ssn_plugin.layers.ssn import SSN
from ssn_plugin.models.collapsed_model import inference_config


def plain_config(config: Config, layers: Mapping[str, SSN]) -> Config:
    """The config of a decided model without anything of this package.

    A ``norm_cfg`` of a framework names one norm for every layer that is made of it, so these must
    have chosen the same normalizer.

    ``layers`` are all SSN layers of the model by their names, decided.

    Raises:
        InputError: If layers of one ``norm_cfg`` chose differently, the backbone has a stem of its
            own, or something else of this package remains.
    """
    plain = inference_config(config)
    for node in _dicts(plain.model):
        if _kind(node) == 'SSNResNet':
            _as_resnet(node)
    ours = _own_names()
    parts = {
        path: node
        for path, node in _places(plain.model)
        if isinstance(node.get('norm_cfg'), dict) and _kind(node['norm_cfg']) in ours
    }
    made = {path: {} for path in parts}
    for name, layer in layers.items():
        above = [path for path in parts if name.startswith(path)]
        if not above:
            raise InputError(f'--plain: got no norm_cfg in the config from which {name} is made')
        made[max(above, key=len)][name] = layer
    for path, node in parts.items():
        # Not changed in place: several parts may share it.
        node['norm_cfg'] = _norm_cfg_of(made[path], f'model.{path}norm_cfg', node['norm_cfg'])
    _drop_training(plain, ours)
    left = sorted({_kind(node) for node in _dicts(plain.to_dict())} & ours)
    if left:
        raise InputError(f'--plain: the config needs {", ".join(left)} of ssn_plugin')
    return plain


def _as_resnet(node: dict) -> None:
    if node.pop('stem_padding', 0) != 1:
        raise InputError(
            '--plain: the stem of SSNResNet pools without padding, as the released weights need '
            "it; only with stem_padding=1 it is the framework's ResNet"
        )
    node['type'] = 'ResNet'
    node.setdefault('norm_cfg', dict(type='SSN'))


def _norm_cfg_of(layers: Mapping[str, SSN], path: str, settings: Mapping) -> dict:
    kept = {key: settings[key] for key in ('requires_grad', 'eps', 'affine') if key in settings}
    selected = {name: Selected(*layer.selected) for name, layer in layers.items()}
    groups = {layer.num_groups for layer in layers.values() if 'GN' in layer.selected}
    chosen = set(selected.values()) or {Selected('BN', 'BN')}  # of which no layer is made
    (mean, var), *others = chosen
    if others or mean != var or len(groups) > 1:
        told = ', '.join(f'{count} {pair}' for pair, count in histogram(selected).items())
        told += f' of {sorted(groups)} groups' * (len(groups) > 1)
        raise InputError(
            f'--plain: the layers of {path} chose {told}, where the framework names one norm for '
            'all: collapse without --plain, or export to ONNX'
        )
    return {
        'BN': dict(type='BN'),
        'IN': dict(type='IN', affine=True),
        'LN': dict(type='GN', num_groups=1),
        'GN': dict(type='GN', num_groups=max(groups, default=1)),
    }[mean] | kept


def _drop_training(config: Config, ours: set[str]) -> None:
    """Take out what trains SSN; what is left trains the plain model."""
    for name in [name for name in config if name.startswith('ssn_') or _kind(config[name]) in ours]:
        config.pop(name)
    imports = config.get('custom_imports') or {}
    names = as_list(imports.get('imports'))
    if 'ssn_plugin' in names:
        names.remove('ssn_plugin')
        config.custom_imports = {**imports, 'imports': names}
    optimizer = config.get('optim_wrapper') or {}
    if optimizer.get('constructor') in ours:
        del optimizer['constructor']
        for key in [key for key in optimizer.get('paramwise_cfg', {}) if key.startswith('ssn_')]:
            del optimizer['paramwise_cfg'][key]
    for hook in (config.get('default_hooks') or {}).values():
        if _kind(hook) == 'SSNCheckpointHook':
            hook['type'] = 'CheckpointHook'
    if config.get('custom_hooks'):
        config.custom_hooks = [hook for hook in config.custom_hooks if _kind(hook) not in ours]


def _own_names() -> set[str]:
    """What this package has registered."""
    return {
        name
        for registry in (MODELS, HOOKS, OPTIM_WRAPPER_CONSTRUCTORS)
        for name, made in registry.module_dict.items()
        if made.__module__.partition('.')[0] == 'ssn_plugin'
    }


def _kind(node: object) -> str:
    """The name of what a part of a config builds, '' if it builds nothing."""
    return type_name(node) if isinstance(node, Mapping) and 'type' in node else ''


def _places(node: object, path: str = '') -> Iterator[tuple[str, dict]]:
    """Every dict in a config, and the names of modules that it builds begin with."""
    if isinstance(node, dict):
        yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children:
        if isinstance(child, dict | list | tuple):
            yield from _places(child, f'{path}{key}.')


def _dicts(node: object) -> list[dict]:
    return [found for _, found in _places(node)]
