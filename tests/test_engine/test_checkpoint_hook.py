"""SSNCheckpointHook does what mmengine's does; tests/test_interruption.py has what it adds."""

import errno
import os
from pathlib import Path

import pytest
import torch
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.registry import METRICS

from ssn_plugin.engine.hooks.checkpoint_hook import SSNCheckpointHook
from ssn_plugin.errors import CheckpointError


def files_in(folder) -> list[str]:
    return sorted(p.name for p in Path(folder).iterdir() if p.is_file() and p.suffix != '.py')


class UpAndDown:
    """Two scores, the second validation the best of the first kind."""

    dataset_meta = None
    prefix = None

    def __init__(self):
        self.scores = iter([1, 3, 2])

    def process(self, data_batch, data_samples):
        pass

    def evaluate(self, size):
        score = next(self.scores)
        return dict(size=score, other=-score)


@pytest.fixture(autouse=True)
def _metric():
    METRICS.register_module(module=UpAndDown, force=True)
    yield
    METRICS.module_dict.pop('UpAndDown')


@pytest.mark.parametrize(
    'settings',
    [
        dict(interval=5),
        dict(interval=1, max_keep_ckpts=1),
        dict(interval=1, max_keep_ckpts=3),
        dict(interval=3, max_keep_ckpts=2, save_last=False, filename_tmpl='at_{}.pth'),
        dict(interval=-1, save_last=True),
        dict(interval=2, save_begin=6),
        dict(interval=4, max_keep_ckpts=1, save_best='size', rule='greater'),
        dict(interval=5, max_keep_ckpts=1, save_best=['size', 'other'], rule=['greater', 'less']),
        dict(interval=4, save_optimizer=False, published_keys=['state_dict']),
    ],
    ids=str,
)
@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_the_same_files_as_of_mmengine(make_runner, by_epoch, settings):
    runs = []
    for kind in ('CheckpointHook', 'SSNCheckpointHook'):
        hook = dict(type=kind, by_epoch=by_epoch, **settings)
        loop = {} if by_epoch else dict(train_cfg=dict(by_epoch=False, max_iters=12))
        loop.get('train_cfg', {}).update(val_interval=4)
        runner = make_runner(
            by_epoch,
            validate=True,
            default_hooks=dict(checkpoint=hook),
            val_evaluator=dict(type='UpAndDown'),
            **loop,
        )
        runner.train()
        runs.append(runner)
    theirs, ours = (Path(runner.work_dir) for runner in runs)
    # of published files the name ends with a hash of their content
    names = [{name.split('-')[0] for name in files_in(folder)} for folder in (theirs, ours)]
    assert names[0] == names[1]
    notes = [folder / 'last_checkpoint' for folder in (theirs, ours)]
    assert notes[0].exists() == notes[1].exists()
    if notes[0].exists():
        assert notes[1].read_text() == notes[0].read_text().replace(str(theirs), str(ours))
        states = [torch.load(note.read_text(), weights_only=False) for note in notes]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0]['state_dict'].items():
            assert torch.equal(states[1]['state_dict'][key], value), key
        hubs = [state['message_hub']['runtime_info'] for state in states]
        for key in ('best_score', 'best_score_size', 'best_score_other', 'iter', 'epoch'):
            assert hubs[0].get(key) == hubs[1].get(key)


def test_out_dir_and_relative_paths(make_runner, tmp_path):
    hook = dict(type='SSNCheckpointHook', by_epoch=False, interval=6, out_dir=str(tmp_path / 'far'))
    runner = make_runner(default_hooks=dict(checkpoint=hook))
    runner.train()
    last = Path(runner.work_dir, 'last_checkpoint').read_text()
    assert last == str(tmp_path / 'far' / Path(runner.work_dir).name / 'iter_12.pth')
    assert torch.load(last, weights_only=False)['meta']['iter'] == 12


@pytest.mark.parametrize(
    'settings', [dict(out_dir='s3://bucket/runs'), dict(backend_args=dict(backend='local'))]
)
def test_a_backend_of_the_users_stays(settings):
    hook = SSNCheckpointHook(**settings)
    assert hook.backend_args == settings.get('backend_args')
    assert SSNCheckpointHook().backend_args == dict(backend='whole_file')


def test_what_a_killed_run_left_half_written_is_cleared_away(make_runner):
    hook = dict(type='SSNCheckpointHook', by_epoch=False, interval=6)
    runner = make_runner(default_hooks=dict(checkpoint=hook))
    for name in ('iter_3.pth', 'last_checkpoint'):
        Path(runner.work_dir, f'{name}.0a1b2c3d.incomplete').write_bytes(b'half')
    Path(runner.work_dir, 'mine.incomplete').write_bytes(b'of somebody else')
    runner.train()
    left = [path.name for path in Path(runner.work_dir).glob('*.incomplete')]
    assert left == ['mine.incomplete']


def test_the_one_to_be_removed_is_removed_by_a_resumed_run(make_runner):
    """A run that dies after its checkpoint is there and before the oldest is gone."""
    hook = dict(type='SSNCheckpointHook', by_epoch=False, interval=2, max_keep_ckpts=2)
    runner = make_runner(
        default_hooks=dict(checkpoint=hook), train_cfg=dict(by_epoch=False, max_iters=6)
    )
    runner.train()
    folder = Path(runner.work_dir)
    assert files_in(folder) == ['iter_4.pth', 'iter_6.pth', 'last_checkpoint']
    (folder / 'iter_2.pth').write_bytes(b'still there')
    resumed = make_runner(default_hooks=dict(checkpoint=hook), work_dir=str(folder), resume=True)
    resumed.train()
    assert files_in(folder) == ['iter_10.pth', 'iter_12.pth', 'last_checkpoint']


def test_read_only_folder_is_one_line(make_runner, monkeypatch):
    hook = dict(type='SSNCheckpointHook', by_epoch=False, interval=6)
    runner = make_runner(default_hooks=dict(checkpoint=hook))
    Path(runner.work_dir, 'iter_6.pth').mkdir()  # root may write anywhere, but not over a folder
    expected = r'iter_6\.pth: cannot be written: Is a directory; there is no earlier checkpoint'
    with pytest.raises(CheckpointError, match=expected):
        runner.train()


def test_backend_for_text_and_folders(tmp_path):
    backend = get_file_backend(backend_args=dict(backend='whole_file'))
    backend.put_text('späte', tmp_path / 'a/b/note')
    assert backend.get_text(tmp_path / 'a/b/note') == 'späte'
    with backend.collecting_removals() as later:
        backend.remove(tmp_path / 'a/b/note')
    assert later == [tmp_path / 'a/b/note']
    assert backend.isfile(tmp_path / 'a/b/note')
    backend.remove(tmp_path / 'a/b/note')
    assert not backend.exists(tmp_path / 'a/b/note')


def opens_no_folder(monkeypatch) -> None:
    """As Windows does."""
    original = os.open

    def refuse(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, 'open', refuse)


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_where_no_folder_can_be_opened(make_runner, monkeypatch, by_epoch):
    opens_no_folder(monkeypatch)
    hook = dict(type='SSNCheckpointHook', by_epoch=by_epoch, interval=1, max_keep_ckpts=1)
    hook |= dict(save_best='size', rule='greater')
    runner = make_runner(by_epoch, validate=True, default_hooks=dict(checkpoint=hook))
    runner.train()
    last = Path(runner.work_dir, 'last_checkpoint').read_text()
    assert torch.load(last, weights_only=False)['meta']['iter'] == 12
    assert len(list(Path(runner.work_dir).glob('best*.pth'))) == 1
    assert not list(Path(runner.work_dir).glob('*incomplete*'))


def test_every_checkpoint_is_brought_to_the_disk(make_runner, monkeypatch):
    """Before it gets its name, and its name after that."""
    happened = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        'fsync',
        lambda handle: happened.append(os.readlink(f'/proc/self/fd/{handle}')) or fsync(handle),
    )
    monkeypatch.setattr(
        os, 'replace', lambda old, new: happened.append((str(old), str(new))) or replace(old, new)
    )
    hook = dict(type='SSNCheckpointHook', by_epoch=False, interval=6)
    runner = make_runner(default_hooks=dict(checkpoint=hook))
    runner.train()
    folder = str(Path(runner.work_dir))
    for name in ('iter_6.pth', 'iter_12.pth', 'last_checkpoint'):
        (at, *_) = (i for i, h in enumerate(happened) if h[1] == f'{folder}/{name}')
        written, (temporary, _), parent = happened[at - 1 : at + 2]
        assert written == temporary
        assert parent == folder


class Rising:
    """A score that rises with every validation."""

    dataset_meta = None
    prefix = None

    def __init__(self):
        self.score = 0

    def process(self, data_batch, data_samples):
        pass

    def evaluate(self, size):
        self.score += 1
        return dict(size=self.score)


@pytest.mark.parametrize('kept', [-1, 1])
def test_a_best_checkpoint_whose_name_repeats(make_runner, kept):
    """By a name without a number, as for a scheduler that wants one: it replaces itself."""
    METRICS.register_module(module=Rising, force=True)
    hook = dict(type='SSNCheckpointHook', by_epoch=True, interval=3, max_keep_ckpts=kept)
    hook |= dict(save_best='size', rule='greater', filename_tmpl='model.pth')
    runner = make_runner(
        True,
        validate=True,
        val_evaluator=dict(type='Rising'),
        default_hooks=dict(checkpoint=hook),
        train_cfg=dict(by_epoch=True, max_epochs=2),  # a third would write it anew
    )
    runner.train()
    METRICS.module_dict.pop('Rising')
    best = Path(runner.work_dir, 'best_size_model.pth')
    assert best.is_file()
    assert torch.load(best, weights_only=False)['meta']['epoch'] == 2
    assert runner.message_hub.get_info('best_ckpt') == str(best)


@pytest.mark.parametrize('settings', [dict(interval=2, max_keep_ckpts=1)])
def test_what_cannot_be_removed_is_said_and_stays(make_runner, monkeypatch, settings):
    runner = make_runner(
        default_hooks=dict(checkpoint=dict(type='SSNCheckpointHook', by_epoch=False, **settings))
    )

    def refuse(self, path):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    monkeypatch.setattr(LocalBackend, 'remove', refuse)
    runner.train()
    assert runner.iter == 12
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert 'iter_2.pth: cannot be removed: Permission denied' in log
    assert Path(runner.work_dir, 'last_checkpoint').read_text().endswith('iter_12.pth')


def test_a_published_file_that_cannot_be_written(make_runner, monkeypatch):
    hook = dict(type='SSNCheckpointHook', by_epoch=False, interval=6, published_keys=['state_dict'])
    runner = make_runner(default_hooks=dict(checkpoint=hook))

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr('mmengine.runner.save_checkpoint', refuse)
    with pytest.raises(CheckpointError, match=r'No space left on device; resume from .*iter_12'):
        runner.train()
