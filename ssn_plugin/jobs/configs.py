"""Reads config files, and options that change them."""

import argparse
import os

from mmengine.config import Config, DictAction

from ssn_plugin.analysis.config_entries import as_list
from ssn_plugin.errors import InputError, in_one_line
from ssn_plugin.jobs.explained_errors import explained

_DICTS = (
    'model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'optim_wrapper', 'train_cfg',
    'val_cfg', 'test_cfg', 'default_hooks', 'env_cfg', 'model_wrapper_cfg',
)  # fmt: skip
_LISTS = ('custom_hooks', 'train_evaluator', 'val_evaluator', 'test_evaluator')
# Of entries that are looked at before mmengine looks at them; None is none.
_KINDS = dict.fromkeys(_DICTS, (dict, 'a dict')) | dict(
    custom_hooks=(list | tuple, 'a list of dicts'),
    load_from=(str, 'the path of a checkpoint'),
    work_dir=(str, 'the path of a folder'),
    default_scope=(str, "a package such as 'mmdet'"),
)


def load_config(path: str, options: dict | None = None) -> Config:
    """Read a config file and merge the command line's options into it.

    Raises:
        InputError: If the file is missing or cannot be read as a config.
    """
    if not os.path.isfile(path):
        raise InputError(f'config: no such file: {path}')
    try:
        config = Config.fromfile(path)
        if options:
            config.merge_from_dict(options)
    except (Exception, SystemExit) as error:
        # mmengine raises whatever a config's own code or a bad option raises.
        reason = explained(error) or in_one_line(error)
        raise InputError(f'config: cannot read {path}: {reason}') from error
    for key, (kind, told) in _KINDS.items():
        _check(path, key, config.get(key), kind, told)
    for key in _LISTS:
        for index, entry in enumerate(as_list(config.get(key))):
            _check(path, f'{key}[{index}]', entry, dict, 'a dict')
    for split in ('train', 'val', 'test'):
        loader = config.get(f'{split}_dataloader')
        if loader:
            _check(path, f'{split}_dataloader.dataset', loader.get('dataset') or 0, dict, 'a dict')
    return config


def _check(path: str, key: str, entry: object, kind: type, told: str) -> None:
    if entry is not None and not isinstance(entry, kind):
        found = 'nothing' if entry == 0 else f'a {type(entry).__name__}'
        raise InputError(f'config: {path}: {key}: got {found}, expected {told}')


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options KEY=VALUE ...``, for :func:`load_config`."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Options,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. train_dataloader.batch_size=1',
    )


class _Options(DictAction):
    """DictAction with argparse's own error for what is no KEY=VALUE."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except ValueError:
            parser.error(f'{option_string}: got {" ".join(values)!r}, expected KEY=VALUE pairs')
