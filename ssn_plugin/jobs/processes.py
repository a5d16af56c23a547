"""Several processes for the scripts of a framework: checked on GPUs, by gloo on the CPU.

mmengine's launcher selects a CUDA device in every process and wraps the model for it, so without a
GPU it fails. A process group that exists already and a wrapper without devices are all it lacks.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device

from ssn_plugin.errors import InputError

_WRAPPER = 'MMDistributedDataParallel'


def join_processes(launcher: str, config: Config, arguments: list[str]) -> list[str]:
    """Prepare this process for the launcher of a framework's script.

    Returns:
        The command line to give it instead.

    Raises:
        InputError: If the process was not started by torchrun, or there are fewer GPUs than
            processes.
    """
    if launcher != 'pytorch':
        return arguments
    missing = [name for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE') if name not in os.environ]
    if missing:
        raise InputError(
            f'--launcher pytorch: got no {missing[0]} in the environment, expected to be started '
            'by torchrun, as tools/dist_train.sh and tools/dist_test.sh do'
        )
    device = get_device()
    if device == 'cuda' and int(os.environ['LOCAL_RANK']) >= torch.cuda.device_count():
        raise InputError(
            f'--launcher pytorch: got {os.environ.get("LOCAL_WORLD_SIZE")} processes on this '
            f'machine, expected at most one for each of its {torch.cuda.device_count()} GPUs'
        )
    if device != 'cpu':
        return arguments
    seconds = config.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)
    dist.init_process_group('gloo', timeout=timedelta(seconds=seconds))
    return with_options(arguments, wrapper_options(config))


def leave_processes() -> None:
    """Take down the process group of a run that is over."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wrapper_options(config: Config) -> list[str]:
    """KEY=VALUE pairs that make the config's model wrapper one for the CPU."""
    wrapper = config.get('model_wrapper_cfg') or {}
    if wrapper.get('type', _WRAPPER) != _WRAPPER:
        return []  # other wrappers have no device_ids
    given = dict(
        type=_WRAPPER,
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=config.get('find_unused_parameters', False),
    )
    return [
        f'model_wrapper_cfg.{name}={value}'
        for name, value in given.items()
        if name == 'device_ids' or name not in wrapper
    ]


def with_options(arguments: list[str], options: list[str]) -> list[str]:
    """A command line with more ``--cfg-options``; argparse takes only the last list of them."""
    # argparse takes abbreviations, and no other option of the scripts begins so.
    places = [i for i, argument in enumerate(arguments) if argument.startswith('--c')]
    if not options:
        return arguments
    if not places:
        return [*arguments, '--cfg-options', *options]
    flag, _, value = arguments[places[-1]].partition('=')
    found = [flag, *([value] if value else []), *options]
    return [*arguments[: places[-1]], *found, *arguments[places[-1] + 1 :]]
