"""Reads config files, and options that change them."""

import argparse
import os

from mmengine.config import Config, DictAction

from ssn_plugin.errors import InputError, in_one_line
from ssn_plugin.jobs.explained_errors import explained


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
    for key in ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader'):
        entry = config.get(key)
        if entry:
            _check_dict(path, key, entry)
            if key != 'model':
                _check_dict(path, f'{key}.dataset', entry.get('dataset'))
    return config


def _check_dict(path: str, key: str, entry: object) -> None:
    if not isinstance(entry, dict):
        found = 'nothing' if entry is None else f'a {type(entry).__name__}'
        raise InputError(f'config: {path}: {key}: got {found}, expected a dict')


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
