"""Runs the host framework's own train and test scripts on a config, once its inputs are checked."""

import argparse
import importlib.util
import os
import runpy
import sys
from pathlib import Path

from mmengine.config import Config, DictAction

from ssn_plugin.engine.preflight import (
    InputError,
    check_checkpoints,
    check_data,
    check_file,
    check_work_dir,
    load_config,
)

_DISTRIBUTIONS = {
    'mmdet': 'onedl-mmdetection (or mmdet)',
    'mmseg': 'onedl-mmsegmentation (or mmsegmentation)',
}


def host_script(config: Config, name: str) -> Path:
    """The script of mmdet or mmseg that a config is for, by its ``default_scope``.

    Args:
        config: The config.
        name: 'train.py' or 'test.py'.

    Raises:
        InputError: If the scope is neither, or the framework is not installed with its tools.
    """
    scope = config.get('default_scope')
    if scope not in _DISTRIBUTIONS:
        raise InputError(f"default_scope: got {scope!r} in the config, expected 'mmdet' or 'mmseg'")
    spec = importlib.util.find_spec(scope)
    if spec is None:
        raise InputError(f'{scope} is not installed: pip install {_DISTRIBUTIONS[scope]}')
    script = Path(spec.origin).parent / '.mim' / 'tools' / name
    if not script.is_file():
        raise InputError(f'{scope} is installed without its tools: no such file: {script}')
    return script


class _Options(DictAction):
    """DictAction with argparse's own error for what is no KEY=VALUE."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except ValueError:
            parser.error(f'{option_string}: got {" ".join(values)!r}, expected KEY=VALUE pairs')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that are looked at before the host's script sees them.

    Args:
        parser: Gets ``config``, ``--work-dir`` and ``--cfg-options``.
    """
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Options,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. train_dataloader.batch_size=1',
    )


def train(args: argparse.Namespace, arguments: list[str]) -> None:
    """Check config, data and weights, then train by the host's ``tools/train.py``.

    Args:
        args: What :func:`add_common_arguments` parsed.
        arguments: The whole command line for the host's script.

    Raises:
        InputError: If something is missing.
    """
    config = load_config(args.config, args.cfg_options)
    script = host_script(config, 'train.py')
    for split in ('train', 'val'):
        check_data(config, split)
    check_checkpoints(config)
    check_work_dir(_work_dir(args, config))
    _run(script, arguments)


def test(args: argparse.Namespace, arguments: list[str]) -> None:
    """Check config, checkpoint and data, then evaluate by the host's ``tools/test.py``.

    Args:
        args: What :func:`add_common_arguments` parsed, and ``checkpoint``.
        arguments: The whole command line for the host's script.

    Raises:
        InputError: If something is missing.
    """
    config = load_config(args.config, args.cfg_options)
    script = host_script(config, 'test.py')
    check_file('checkpoint', args.checkpoint)
    check_data(config, 'test')
    check_work_dir(_work_dir(args, config))
    _run(script, arguments)


def _work_dir(args: argparse.Namespace, config: Config) -> str:
    """The folder the host's script is going to choose."""
    return (
        args.work_dir or config.get('work_dir') or os.path.join('work_dirs', Path(args.config).stem)
    )


def _run(script: Path, arguments: list[str]) -> None:
    # A Runner's checkpoint holds log histories, which torch.load refuses since 2.6 unless told
    # otherwise. onedl-mmengine tells it, the original mmengine could neither resume nor test.
    os.environ.setdefault('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name='__main__')
