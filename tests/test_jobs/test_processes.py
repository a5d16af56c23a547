"""What the framework's scripts are given so that several processes run on the CPU."""

import pytest
from mmengine.config import Config

from ssn_plugin.errors import InputError
from ssn_plugin.jobs import processes

DEFAULT = [
    'model_wrapper_cfg.type=MMDistributedDataParallel',
    'model_wrapper_cfg.device_ids=None',
    'model_wrapper_cfg.broadcast_buffers=False',
    'model_wrapper_cfg.find_unused_parameters=False',
]


@pytest.mark.parametrize(
    ('config', 'options'),
    [
        (dict(), DEFAULT),
        (
            dict(find_unused_parameters=True),
            [*DEFAULT[:3], 'model_wrapper_cfg.find_unused_parameters=True'],
        ),
        (
            dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', broadcast_buffers=True)),
            [DEFAULT[1], DEFAULT[3]],
        ),
        # of the GPUs that a config was written for, and which the CPU refuses
        (
            dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=[0])),
            DEFAULT[1:],
        ),
        (dict(model_wrapper_cfg=dict(device_ids=[0, 1])), DEFAULT),
        (dict(model_wrapper_cfg=dict(type='MMFullyShardedDataParallel')), []),
    ],
)
def test_wrapper_options(config, options):
    assert processes.wrapper_options(Config(config)) == options


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['a.py'], ['a.py', '--cfg-options', 'x=1']),
        (['a.py', '--cfg-options', 'b=2', 'c=3'], ['a.py', '--cfg-options', 'x=1', 'b=2', 'c=3']),
        (['--cfg-options=b=2', 'a.py'], ['--cfg-options', 'b=2', 'x=1', 'a.py']),
        (['a.py', '--cfg', 'b=2', '--amp'], ['a.py', '--cfg', 'x=1', 'b=2', '--amp']),
        # argparse takes the last list
        (
            ['a.py', '--cfg-options', 'b=2', '--cfg-options', 'c=3'],
            ['a.py', '--cfg-options', 'b=2', '--cfg-options', 'x=1', 'c=3'],
        ),
    ],
)
def test_more_options(arguments, expected):
    assert processes.with_options(arguments, ['x=1']) == expected
    assert processes.with_options(arguments, []) == arguments


def test_other_launchers_get_their_command_line_as_it_is():
    assert processes.join_processes('none', Config(dict()), ['a.py']) == ['a.py']


def test_a_process_that_torchrun_did_not_start(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(InputError, match=r'got no RANK .* expected to be started by torchrun'):
        processes.join_processes('pytorch', Config(dict()), ['a.py'])


def test_fewer_gpus_than_processes(monkeypatch):
    for name, value in dict(RANK=2, LOCAL_RANK=2, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, 'get_device', lambda: 'cuda')
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    with pytest.raises(InputError, match=r'got 3 processes .* at most one for each of its 2 GPUs'):
        processes.join_processes('pytorch', Config(dict()), ['a.py'])
