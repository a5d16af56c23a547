"""Finds in a config, read as nested dicts, what it names: data sets, weights and norm layers."""

import os
from collections.abc import Iterator, Mapping


def type_name(entry: Mapping) -> str:
    """The class that an entry of a config builds, without its module.

    Args:
        entry: A dict with ``type``, which may be a name or a class.
    """
    kind = entry.get('type')
    return kind.__name__ if isinstance(kind, type) else str(kind).rsplit('.', 1)[-1]


def datasets_of(config: Mapping, split: str) -> Iterator[tuple[str, Mapping]]:
    """The data sets of a loader, out of their wrappers, with their places in the config.

    Args:
        config: The whole config.
        split: 'train', 'val' or 'test'.
    """
    loader = config.get(f'{split}_dataloader')
    if loader:
        yield from _leaves(loader['dataset'], f'{split}_dataloader.dataset')


def _leaves(dataset: Mapping, key: str) -> Iterator[tuple[str, Mapping]]:
    if 'dataset' in dataset:
        yield from _leaves(dataset['dataset'], f'{key}.dataset')
    elif 'datasets' in dataset:
        for index, part in enumerate(dataset['datasets']):
            yield from _leaves(part, f'{key}.datasets.{index}')
    else:
        yield key, dataset


def data_folders(dataset: Mapping) -> list[str]:
    """The folders a data set reads, by its ``data_root``, ``data_prefix`` and ``split``.

    Args:
        dataset: Its config.
    """
    prefix = dataset.get('data_prefix') or {}
    if not prefix and type_name(dataset) == 'ImageNet':
        prefix = dataset.get('split') or {}
    names = [prefix] if isinstance(prefix, str) else prefix.values()
    root = str(dataset.get('data_root') or '')
    return [os.path.join(root, name) for name in names if isinstance(name, str) and name]


def pretrained_in(node: object, key: str) -> Iterator[tuple[str, str, str]]:
    """The weights that a config names, by ``init_cfg``, which may be a list, or ``pretrained``.

    Args:
        node: A piece of the config.
        key: Its place.

    Yields:
        Place of the file's name, place of what to set to None to do without, and the name.
    """
    if isinstance(node, Mapping):
        if isinstance(node.get('pretrained'), str):
            yield f'{key}.pretrained', f'{key}.pretrained', node['pretrained']
        if node.get('type') == 'Pretrained' and isinstance(node.get('checkpoint'), str):
            yield f'{key}.checkpoint', key, node['checkpoint']
        for name, child in node.items():
            yield from pretrained_in(child, f'{key}.{name}')
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from pretrained_in(child, f'{key}.{index}')


def norm_configs(node: object, key: str) -> Iterator[tuple[str, Mapping]]:
    """Every ``norm_cfg`` of a config that names a layer.

    Args:
        node: A piece of the config.
        key: Its place.

    Yields:
        Place of the part of the model that has it, and the ``norm_cfg``.
    """
    if isinstance(node, Mapping):
        for name, child in node.items():
            if name == 'norm_cfg' and isinstance(child, Mapping):
                yield key, child
            else:
                yield from norm_configs(child, f'{key}.{name}'.lstrip('.'))
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from norm_configs(child, f'{key}.{index}')


def as_list(value: object) -> list:
    """What a config gives once, several times in a list, or not at all, as a list.

    Args:
        value: An entry such as ``custom_hooks`` or ``val_evaluator``.
    """
    return list(value) if isinstance(value, list | tuple) else [value] if value else []
