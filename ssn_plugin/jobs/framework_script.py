"""Runs the framework's own train and test scripts on a config, once its inputs are checked."""

import argparse
import importlib.util
import os
import runpy
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device

from ssn_plugin.checkpoint.unpickling import refuse_code
from ssn_plugin.engine.start_check import check_norms_asked_for
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.class_folders import check_class_folders
from ssn_plugin.jobs.configs import add_config_options, load_config
from ssn_plugin.jobs.explained_errors import before_the_work, explained
from ssn_plugin.jobs.last_checkpoint import last_checkpoint
from ssn_plugin.jobs.model_check import (
    check_constructor,
    check_norms,
    checked_model,
    start_options,
)
from ssn_plugin.jobs.preflight import (
    check_checkpoint,
    check_checkpoints,
    check_data,
    check_resumable,
    check_work_dir,
)
from ssn_plugin.jobs.processes import join_processes, leave_processes, with_options

# Packages that are installed by another name than they are imported by.
_DISTRIBUTIONS = {
    'mmdet': 'onedl-mmdetection (or mmdet)',
    'mmseg': 'onedl-mmsegmentation (or mmsegmentation)',
    'mmpretrain': 'onedl-mmpretrain (or mmpretrain), beside torchvision',
    'mmaction': 'mmaction2',
}


def framework_script(config: Config, name: str) -> Path:
    """The 'train.py' or 'test.py' of the framework that a config names by its ``default_scope``.

    Raises:
        InputError: If the scope is no package, or it is not installed with its tools.
    """
    scope = config.get('default_scope')
    if not isinstance(scope, str) or not scope.isidentifier():
        raise InputError(
            f"default_scope: got {scope!r} in the config, expected a package such as 'mmdet'"
        )
    spec = importlib.util.find_spec(scope)
    if spec is None or spec.origin is None:
        raise InputError(
            f'{scope} is not installed: pip install {_DISTRIBUTIONS.get(scope, scope)}'
        )
    script = Path(spec.origin).parent / '.mim' / 'tools' / name
    if not script.is_file():
        raise InputError(
            f'{scope} is installed without its tools: no such file: {script}; '
            f"run the {name} of its repository, custom_imports=dict(imports=['ssn_plugin']) is all "
            'that it needs'
        )
    return script


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of training; all but ``config`` and ``--cfg-options`` are the framework's."""
    _add_common_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from the latest checkpoint of the work dir; mmdet and mmpretrain also take a '
        'file',
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='mmdet and mmpretrain: by the batch size'
    )


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of testing; all but ``config`` and ``--cfg-options`` are the framework's."""
    _add_common_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='where to write the predictions')
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument('--wait-time', type=float, help='seconds between shown pictures')
    parser.add_argument('--tta', action='store_true', help='test time augmentation')


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    # The framework's script parses them again. They are declared here so that their values are not
    # taken for positional arguments.
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    add_config_options(parser)
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def train(args: argparse.Namespace, arguments: list[str]) -> None:
    """Check config, data and weights, then train by the framework's ``tools/train.py``.

    ``arguments`` are the whole command line for that script.

    Raises:
        InputError: If something is missing.
    """
    config = _config_of(args)
    if args.amp and get_device() == 'cpu':
        raise InputError("--amp: got no GPU, expected one: mmengine's AmpOptimWrapper needs it")
    script = framework_script(config, 'train.py')
    for split in ('train', 'val'):
        check_data(config, split)
    check_class_folders(config, ('train', 'val'))
    model = checked_model(config, args.config)
    if model is not None:
        check_norms_asked_for(model, config.to_dict())
    check_constructor(config)
    work_dir = _work_dir(args, config)
    resumed = _resumed(args, config, work_dir)
    if resumed is not None:
        check_resumable(resumed)
    check_checkpoints(config, model=model)
    del model
    check_work_dir(work_dir)
    _run(script, config, args.launcher, arguments)


def test(args: argparse.Namespace, arguments: list[str]) -> None:
    """Check config, checkpoint and data, then evaluate by the framework's ``tools/test.py``.

    ``arguments`` are the whole command line for that script.

    Raises:
        InputError: If something is missing.
    """
    config = _config_of(args)
    script = framework_script(config, 'test.py')
    checkpoint = check_checkpoint('checkpoint', args.checkpoint)
    check_checkpoints(config, training=False)
    check_data(config, 'test')
    check_class_folders(config, ('test',))
    model = checked_model(config, args.config)
    if model is not None:
        check_norms(model, 'checkpoint', args.checkpoint, checkpoint)
    del model
    check_work_dir(_work_dir(args, config))
    _run(script, config, args.launcher, arguments)


def _config_of(args: argparse.Namespace) -> Config:
    """The config of a run, in a process that from here on unpickles no code."""
    refuse_code()
    config = load_config(args.config, args.cfg_options)
    if not config.get('model'):
        raise InputError(f'config: {args.config} has no model')
    return config


def _work_dir(args: argparse.Namespace, config: Config) -> str:
    """The folder the framework's script is going to choose."""
    return (
        args.work_dir or config.get('work_dir') or os.path.join('work_dirs', Path(args.config).stem)
    )


def _resumed(args: argparse.Namespace, config: Config, work_dir: str) -> str | None:
    """The checkpoint that the run is going to go on from; None where it starts anew."""
    if args.resume not in (None, 'auto'):
        return args.resume
    if not (args.resume or config.get('resume')):
        return None
    # mmseg has no file to name by --resume, and leaves load_from as it is.
    named = config.get('load_from')
    if args.resume and config.default_scope != 'mmseg':
        named = None
    return named or last_checkpoint(work_dir)


def _run(script: Path, config: Config, launcher: str, arguments: list[str]) -> None:
    arguments = with_options(arguments, start_options(config))
    sys.argv = [str(script), *join_processes(launcher, config, arguments)]
    try:
        runpy.run_path(str(script), run_name='__main__')
        leave_processes()
    except CheckpointError as error:
        # Weights that do not fill the built backbone, code in a file that some class reads, a
        # checkpoint that cannot be written.
        raise InputError(str(error)) from error
    except InputError:
        raise
    except Exception as error:
        text = explained(error) or before_the_work(error)
        if text is None:
            raise
        raise InputError(text) from error
