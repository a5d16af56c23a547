"""Reads config files."""

import os

from mmengine.config import Config

from ssn_plugin.errors import InputError, in_one_line


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
    except Exception as error:
        # mmengine raises whatever a config's own code or a bad option raises.
        raise InputError(f'config: cannot read {path}: {in_one_line(error)}') from error
    return config
