"""A training that is killed, any number of times, ends as one that is not; so does a full disk.

Every run is a process of its own and every kill a SIGKILL. SSN_KILLS=200 kills that often at random
moments, instead of a dozen times.
"""

import contextlib
import errno
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import interrupted_run
import pytest
import torch

KILLS = int(os.environ.get('SSN_KILLS', '12'))
LOOPS = {'iter': False, 'epoch': True}
LARGE = 30_000_000  # bytes that take a while to be written


@pytest.fixture(scope='module')
def processes():
    """Starts processes in which everything is imported already."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['interrupted_run'])
    path = os.pathsep.join([*sys.path, str(Path(interrupted_run.__file__).parent)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', path)
        yield context


@contextlib.contextmanager
def running(processes, settings, file_limit=None):
    """A training process and the end of its pipe; killed at the end if it is still there."""
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=interrupted_run.train, args=(settings, theirs, file_limit))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


def messages(connection):
    with contextlib.suppress(EOFError):
        while True:
            yield connection.recv()


def kill_at(processes, settings, iteration: int) -> None:
    """Train until an iteration begins, and kill the process there."""
    with running(processes, settings) as (process, connection):
        for told, _ in messages(connection):
            if told == iteration:
                break
        process.kill()
        process.join()
        assert process.exitcode == -9


def finish(processes, settings, **limits) -> list:
    """Train to the end; what the process told."""
    with running(processes, settings, **limits) as (process, connection):
        told = list(messages(connection))
        process.join()
        assert process.exitcode == 0
    return told


def last_checkpoint(settings: dict) -> Path | None:
    """The checkpoint that a resumed run starts from; it has to be whole."""
    note = Path(settings['work_dir'], 'last_checkpoint')
    if not note.exists():
        return None
    path = Path(note.read_text())
    read(path)
    return path


def read(path: Path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)


def flattened(value, name='') -> dict:
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in pairs for k, v in flattened(part, f'{name}.{key}').items()}
    return {name: value}


def check_equal(ours: Path, theirs: Path) -> None:
    """The same bits: weights, ratios, radius, flags, statistics, optimizer, schedule."""
    ours, theirs = read(ours), read(theirs)
    for entry in ('state_dict', 'optimizer', 'param_schedulers'):
        found, expected = flattened(ours[entry]), flattened(theirs[entry])
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            same = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
            assert same, f'{entry}{key}'
    assert ours['meta']['iter'] == theirs['meta']['iter'] == interrupted_run.ITERATIONS


class Straight:
    """Uninterrupted runs, one per loop."""

    def __init__(self, processes, folder: Path):
        self.runs = {}
        for loop, by_epoch in LOOPS.items():
            settings = interrupted_run.config(str(folder / loop), by_epoch)
            told = finish(processes, settings)
            assert [iteration for iteration, _ in told] == list(range(interrupted_run.ITERATIONS))
            self.runs[loop] = last_checkpoint(settings), [frozen for _, frozen in told]

    def __getitem__(self, loop: str):
        return self.runs[loop]


@pytest.fixture(scope='module')
def straight(processes, tmp_path_factory):
    return Straight(processes, tmp_path_factory.mktemp('straight'))


def test_the_uninterrupted_runs_are_worth_repeating(straight):
    for loop in LOOPS:
        checkpoint, frozen = straight[loop]
        state = read(checkpoint)['state_dict']
        assert all(value.isfinite().all() for value in state.values())
        # Choices freeze one after the other, and not all are alike.
        assert len(set(frozen)) > 3
        assert (frozen[0], frozen[-1]) == (0, 6)
        assert len({tuple(v.tolist()) for k, v in state.items() if k.endswith('_weight')}) > 1


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('loop', LOOPS)
def test_killed_before_during_and_after_freezing(loop, num_workers, processes, straight, tmp_path):
    """The number of workers is not that of the uninterrupted run, and makes no difference."""
    expected, frozen = straight[loop]
    settings = interrupted_run.config(str(tmp_path / 'run'), LOOPS[loop], num_workers)
    first = next(i for i, count in enumerate(frozen) if count > 0)
    all_of_them = frozen.index(6)
    resumed_at = []
    for moment in (first - 1, (first + all_of_them) // 2, all_of_them + 2):
        kill_at(processes, settings, moment)
        checkpoint = last_checkpoint(settings)
        done = 0 if checkpoint is None else read(checkpoint)['meta']['iter']
        resumed_at.append(done)
    assert resumed_at[-1] > 0
    told = finish(processes, settings)
    assert told[0][0] == resumed_at[-1]
    check_equal(last_checkpoint(settings), expected)


def test_killed_at_random_moments(processes, straight, tmp_path):
    """In the start, in an iteration, in a validation, while files are written or removed."""
    chance = random.Random(KILLS)
    killed = run = 0
    while killed < KILLS:
        loop = ('iter', 'epoch')[run % 2]
        run += 1
        settings = interrupted_run.config(str(tmp_path / f'run{run}'), LOOPS[loop])
        finished = False
        while not finished and killed < KILLS:
            with running(processes, settings) as (process, connection):
                if chance.random() < 0.9:
                    next(messages(connection), None)  # the first iteration
                process.join(chance.uniform(0, 0.25))
                finished = process.exitcode == 0
                assert finished or process.exitcode is None
            killed += not finished
            last_checkpoint(settings)
        finish(processes, settings)
        check_equal(last_checkpoint(settings), straight[loop][0])
        left = sorted(path.name for path in Path(settings['work_dir']).iterdir() if path.is_file())
        # The last checkpoint, and nothing half-written. Of the best ones none is lost; one more
        # than wanted may be left, and a validation that was cut short is not repeated.
        checkpoints = [name for name in left if '.pth' in name and not name.startswith('best')]
        assert checkpoints == [last_checkpoint(settings).name]
        for name in left:
            if name.startswith('best'):
                read(Path(settings['work_dir'], name))
    print(f'{killed} kills in {run} runs')


def test_killed_while_a_checkpoint_is_written(processes, tmp_path):
    model = dict(type='DropoutNet', ballast=LARGE)
    settings = interrupted_run.config(str(tmp_path / 'run'), False, model=model)
    for _ in range(2):
        with running(processes, settings) as (process, connection):
            told = (iteration for iteration, _ in messages(connection))
            next(told), next(told), next(told)  # at least one checkpoint is there
            while not (begun := list(tmp_path.glob('run/*.pth.*.incomplete'))):
                assert process.exitcode is None
                time.sleep(0.0005)
            process.kill()
            process.join()
        assert last_checkpoint(settings) not in begun
    assert last_checkpoint(settings).stat().st_size > LARGE


@pytest.mark.parametrize('loop', LOOPS)
def test_file_system_that_takes_no_more(loop, processes, straight, tmp_path):
    """Writing fails half-way through a checkpoint; with space it goes on from the one before."""
    settings = interrupted_run.config(str(tmp_path / 'run'), LOOPS[loop])
    kill_at(processes, settings, 14)
    before = last_checkpoint(settings)
    content = before.read_bytes()
    *_, message = finish(processes, settings, file_limit=len(content) // 2)
    assert str(before) in message
    assert f'cannot be written: {os.strerror(errno.EFBIG)}; resume from' in message
    assert '\n' not in message
    assert last_checkpoint(settings) == before
    assert before.read_bytes() == content
    assert not list(tmp_path.glob('run/*.incomplete'))
    finish(processes, settings)
    check_equal(last_checkpoint(settings), straight[loop][0])


def test_full_disk(processes, straight, tmp_path):
    """On a disk of its own, which root may make out of memory."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('no permission to mount a file system')
    try:
        settings = interrupted_run.config(str(tmp_path / 'run'), False)
        settings['default_hooks']['checkpoint'] |= dict(out_dir=str(disk), interval=5)
        kill_at(processes, settings, 8)
        before = last_checkpoint(settings)
        assert before.parent == disk / 'run'
        with contextlib.suppress(OSError), open(disk / 'other', 'wb') as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        *_, message = finish(processes, settings)
        assert f'cannot be written: {os.strerror(errno.ENOSPC)}; resume from {before}' in message
        assert last_checkpoint(settings) == before
        assert not list(disk.glob('run/*.incomplete'))
        (disk / 'other').unlink()
        finish(processes, settings)
        check_equal(last_checkpoint(settings), straight['iter'][0])
    finally:
        subprocess.run(['umount', str(disk)], check=True)


@pytest.mark.parametrize('loop', LOOPS)
def test_without_the_hook_a_resumed_run_goes_elsewhere(loop, processes, straight, tmp_path):
    """Or the tests above would show nothing."""
    settings = interrupted_run.config(str(tmp_path / 'run'), LOOPS[loop])
    settings['custom_hooks'] = settings['custom_hooks'][1:]
    kill_at(processes, settings, 14)
    finish(processes, settings)
    weights = [read(path)['state_dict'] for path in (last_checkpoint(settings), straight[loop][0])]
    assert not torch.equal(*(state['head.weight'] for state in weights))
