"""Finds in a config, read as nested dicts, what it names: data sets, weights and norm layers."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


def type_name(entry: Mapping) -> str:
    """The class that an entry of a config names or holds as its ``type``, without its module."""
    kind = entry.get('type')
    return kind.__name__ if isinstance(kind, type) else str(kind).rsplit('.', 1)[-1]


def datasets_of(config: Mapping, split: str) -> Iterator[tuple[str, Mapping]]:
    """The data sets of a loader, out of their wrappers, with their places in the config."""
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
    """The folders a data set reads, by its ``data_root``, ``data_prefix`` and ``split``."""
    prefix = dataset.get('data_prefix') or {}
    if not prefix and type_name(dataset) == 'ImageNet':
        prefix = dataset.get('split') or {}
    names = [prefix] if isinstance(prefix, str) else prefix.values()
    root = str(dataset.get('data_root') or '')
    return [os.path.join(root, name) for name in names if isinstance(name, str) and name]


def is_remote(entry: Mapping, path: str) -> bool:
    """Whether an entry reads a path from elsewhere than the disk, as its backend says.

    Example:
        >>> from ssn_plugin.analysis.config_entries import is_remote
        >>> is_remote({'backend_args': {'backend': 'petrel'}}, 'data/img')
        True
        >>> is_remote({'backend_args': {'backend': 'local'}}, 'data/img')
        False
    """
    backend = entry.get('backend_args') or entry.get('file_client_args') or {}
    return '://' in path or backend.get('backend', 'disk') not in ('local', 'disk')


class NamedCheckpoint(NamedTuple):
    """A file of weights that a config names.

    Attributes:
        key: Place of its name.
        switch: Place of what to set to None to do without.
        path: The name: a file, or an address that mmengine knows.
        initial: Whether a training starts from it; else it is read when the model is built.
    """

    key: str
    switch: str
    path: str
    initial: bool


def checkpoints_in(node: object, key: str) -> Iterator[NamedCheckpoint]:
    """The weights that a config names: by ``init_cfg``, ``pretrained`` or in any other entry.

    Example:
        >>> from ssn_plugin.analysis.config_entries import checkpoints_in
        >>> [entry.key for entry in checkpoints_in({'teacher_ckpt': 'gfl.pth'}, 'model')]
        ['model.teacher_ckpt']
    """
    if isinstance(node, Mapping):
        pretrained = type_name(node).startswith('Pretrained')
        for name, child in node.items():
            place = f'{key}.{name}'
            if not isinstance(child, str):
                yield from checkpoints_in(child, place)
            elif pretrained and name == 'checkpoint':
                yield NamedCheckpoint(place, key, child, True)
            elif name == 'pretrained' or _names_weights(name, child):
                yield NamedCheckpoint(place, place, child, name == 'pretrained')
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from checkpoints_in(child, f'{key}.{index}')


def _names_weights(name: str, value: str) -> bool:
    ends = value.endswith(('.pth', '.pt', '.ckpt', '.pth.tar'))
    return ends or ('://' in value and re.search('ckpt|checkpoint|pretrained', name) is not None)


def norm_configs(node: object, key: str) -> Iterator[tuple[str, Mapping]]:
    """Every ``norm_cfg`` of a config that names a layer.

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
    """What a config gives once, several times in a list, or not at all, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value] if value else []
