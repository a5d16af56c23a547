"""Reading files, whole or broken, and writing whole files or none."""

import hashlib
import math
import multiprocessing
import os
import pickle
import resource
import signal
import stat
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from released_files import released_checkpoint, released_state, save

from ssn_plugin import SSN
from ssn_plugin.checkpoint.files import (
    check_writable,
    md5_of,
    read_checkpoint,
    weights_entry,
    weights_in,
    write_checkpoint,
)
from ssn_plugin.errors import CheckpointError

SERIALISATION = pytest.mark.parametrize('legacy', [True, False], ids=['legacy', 'zip'])


@pytest.fixture
def file(tmp_path):
    return tmp_path / 'net.pth'


def message_of(function, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*args, **kwargs)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- reading


@SERIALISATION
def test_what_a_training_script_keeps_is_readable(file, legacy):
    """Optimizer, scheduler, numpy scalars and arrays, containers: no flag, weights bit by bit."""
    state = released_state(width=4)
    checkpoint = released_checkpoint(state) | dict(
        array=np.arange(6.0).reshape(2, 3),
        integers=[np.int64(3), np.float32(0.5), np.bool_(True)],
        nested={'a': [(1, None, {2}), OrderedDict(b=torch.ones(2))]},
        size=torch.Size([1, 2]),
        dtype=torch.float16,
    )
    read = read_checkpoint(save(checkpoint, file, legacy))
    assert (read['epoch'], read['model']) == (100, 'resnet_v1_ssn')
    assert read['optimizer']['param_groups'][0]['momentum'] == 0.9
    assert read['lr_scheduler']['milestones'] == {30: 1, 60: 1, 90: 1}
    weights = weights_in(read, str(file))
    assert list(weights) == list(state)
    assert all(torch.equal(weights[key], value) for key, value in state.items())


def test_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = message_of(read_checkpoint, 'sub/net.pth')
    assert text == f'sub/net.pth: no such file (looked for from {tmp_path})'


def test_folder(tmp_path):
    assert (
        message_of(read_checkpoint, tmp_path)
        == f'{tmp_path}: is a folder, expected a checkpoint file'
    )


@pytest.mark.parametrize(
    'content',
    [
        '', '\n', 'hello', 'Not found', '<html></html>', '{"a": 1}', 'a,b\n1,2\n', 'true', 'N.',
        'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'class: 1\nscore: 0.5\n',
        'config of my net\n', '\x80\x02}q\x00.', 'PK\x03\x04', '\x1f\x8b\x08\x00',
        '\x89PNG\r\n\x1a\n', 'GIF89a', *map(chr, range(32, 127)),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint(file, content):
    file.write_text(content, encoding='latin1')
    text = message_of(read_checkpoint, file)
    assert text.startswith(f'{file}: ')
    assert 'not a checkpoint of torch' in text


@SERIALISATION
def test_a_file_truncated_anywhere(file, tmp_path, legacy):
    path = save(released_checkpoint(released_state(width=1)), tmp_path / 'whole.pth', legacy)
    content = (tmp_path / 'whole.pth').read_bytes()
    assert 'state_dict' in read_checkpoint(path)
    size = len(content)
    ends = {*range(0, size, size // 50), *range(40), *range(size - 40, size)}
    # Inside the name of a type it looks as if another type were asked for.
    types = [content.find(name) for name in (b'OrderedDict', b'_rebuild_tensor', b'FloatStorage')]
    ends -= {end for start in types for end in range(start - 10, start + 20)}
    for end in sorted(ends):
        file.write_bytes(content[:end])
        text = message_of(read_checkpoint, file)
        assert 'not a checkpoint of torch' in text, end
        assert end < 5 or 'truncated' in text, end


def test_it_comes_to_the_cpu_and_no_more_than_a_dict(file):
    assert message_of(read_checkpoint, save([torch.ones(1)], file)) == (
        f'{file}: holds a list, expected a dict'
    )


# ---------------------------------------------------------------- weights in it


STATE = OrderedDict({'a.module.weight': torch.ones(2), 'module_b.weight': torch.zeros(1)})


@pytest.mark.parametrize('entry', ['state_dict', 'model', 'net', None])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_weights_in(entry, prefix):
    state = OrderedDict((prefix + key, value) for key, value in STATE.items())
    checkpoint = state if entry is None else {'epoch': 1, entry: state}
    assert weights_entry(checkpoint) == entry
    assert list(weights_in(checkpoint, 'f')) == list(STATE)


@pytest.mark.parametrize('outer', ['model', 'state_dict'])
@pytest.mark.parametrize('inner', ['model', 'state_dict', 'net'])
def test_weights_within_what_bears_their_name(outer, inner):
    checkpoint = {'epoch': 1, outer: {'epoch': 1, inner: STATE}}
    assert list(weights_in(checkpoint, 'f')) == list(STATE)
    assert weights_entry(checkpoint) == outer


def test_names_of_wrapped_parts():
    names = ('layer1._fsdp_wrapped_module.0.bn1', 'module.layer1._checkpoint_wrapped_module.0.bn1')
    for name in names:
        assert list(weights_in({f'{name}.weight': torch.ones(1)}, 'f')) == ['layer1.0.bn1.weight']
    # an average inside a model (BYOL) is called so
    name = 'target_net.module.0.conv1.weight'
    assert list(weights_in({name: torch.ones(1)}, 'f')) == [name]


def test_weights_without_values():
    """As a model saves that was built on the meta device and never filled."""
    state = torch.nn.Linear(2, 2, device='meta').state_dict()
    said = message_of(weights_in, {'state_dict': state}, 'net.pth')
    assert said == 'net.pth: weight has no values: it was saved from the meta device'
    state = {'weight': torch.ones(2, 2).to_sparse()}
    assert message_of(weights_in, state, 'net.pth').startswith('net.pth: weight is a sparse tensor')


def test_the_release_names_its_model_by_a_string():
    checkpoint = {'model': 'resnet', 'state_dict': STATE}
    assert weights_entry(checkpoint) == 'state_dict'
    assert weights_entry({'model': STATE, 'state_dict': STATE}) == 'state_dict'


@pytest.mark.parametrize(
    'checkpoint',
    [
        {},
        {'epoch': 1},
        {'state_dict': {}},
        {'state_dict': {'a': np.ones(2)}},
        {'state_dict': {1: torch.ones(2)}},
    ],
)
def test_no_weights(checkpoint):
    assert (
        message_of(weights_in, checkpoint, 'net.pth') == 'net.pth: holds no state dict of weights'
    )


def test_weights_of_several_networks():
    checkpoint = {'student': STATE, 'teacher': STATE, 'epoch': 3}
    said = message_of(weights_in, checkpoint, 'net.pth')
    assert said.startswith('net.pth: holds several state dicts, student, teacher: save')


@pytest.mark.parametrize(
    'changes',
    [
        dict(var_weight=None),
        dict(mean_weight=None),
        dict(var_fixed=None),
        dict(mean_weight=torch.ones(2)),
        dict(mean_weight=torch.ones(0), var_weight=torch.ones(0)),
        dict(radius=torch.ones(3)),
        dict(mean_fixed=torch.ones(2)),
    ],
)
def test_layers_that_are_not_whole(changes):
    layer = dict(
        mean_weight=torch.ones(3), var_weight=torch.ones(3), radius=torch.zeros(()),
        mean_fixed=torch.zeros(1), var_fixed=torch.zeros(1),
    )  # fmt: skip
    weights_in({f'a.sn1.{key}': value for key, value in layer.items()}, 'net.pth')
    broken = {key: value for key, value in (layer | changes).items() if value is not None}
    text = message_of(weights_in, {f'a.sn1.{key}': value for key, value in broken.items()}, 'n.pth')
    assert text.startswith('n.pth: a.sn1 is no whole SSN or SN layer: ')


@pytest.mark.parametrize('radius', [math.nan, -0.1])
def test_a_radius_that_is_none(radius):
    state = SSN(4).state_dict() | {'radius': torch.tensor(radius)}
    assert f'it has the radius {radius}'[:20] in message_of(weights_in, state, 'n.pth')


def test_a_pickle_that_torch_warns_of(file):
    """Of another protocol than torch's: what is said is one line."""
    file.write_bytes(pickle.dumps({'a': 1}))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'not a checkpoint of torch' in message_of(read_checkpoint, file)


@pytest.mark.parametrize('size', [0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 7])
def test_md5(file, size):
    content = os.urandom(size)
    file.write_bytes(content)
    assert md5_of(file) == hashlib.md5(content).hexdigest()


# ---------------------------------------------------------------- writing


CONTENT = {'meta': {'a': 1}, 'state_dict': {'w': torch.arange(3000.0)}}


def in_a_child(function, *args) -> str:
    """What a function says from a process of its own, with limits of its own."""
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)

    def body():
        try:
            function(*args)
            sender.send('written')
        except BaseException as error:
            sender.send(f'{type(error).__name__}: {error}')

    process = context.Process(target=body)
    process.start()
    assert receiver.poll(30)
    text = receiver.recv()
    process.join(30)
    return text


@pytest.mark.parametrize('mask', [0o022, 0o077, 0o002])
def test_written_file(file, mask):
    before = os.umask(mask)
    try:
        write_checkpoint(CONTENT, file)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert torch.equal(read_checkpoint(file)['state_dict']['w'], torch.arange(3000.0))
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
    assert os.listdir(file.parent) == ['net.pth']


def test_an_existing_file_is_left_alone(file):
    file.write_text('mine')
    for function, args in ((write_checkpoint, (CONTENT, file)), (check_writable, (file,))):
        assert 'exists already; name another file or give --overwrite' in message_of(
            function, *args
        )
    assert file.read_text() == 'mine'
    write_checkpoint(CONTENT, file, overwrite=True)
    assert read_checkpoint(file)['meta'] == {'a': 1}
    assert os.listdir(file.parent) == ['net.pth']


def limited(path, size, overwrite=False):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    write_checkpoint(CONTENT, path, overwrite)


@pytest.mark.parametrize('size', [10, 500, 6000, 12000])
@pytest.mark.parametrize('overwrite', [False, True])
def test_a_full_disk_leaves_nothing(file, size, overwrite):
    """By a limit on the size of files, which the system enforces as it does the end of a disk."""
    if overwrite:
        file.write_text('mine')
    assert in_a_child(limited, file, size, overwrite) == (
        f'CheckpointError: {file}: cannot be written: File too large'
    )
    assert os.listdir(file.parent) == ['net.pth'] * overwrite
    assert not overwrite or file.read_text() == 'mine'
    assert in_a_child(limited, file, 100_000, overwrite) == 'written'


class Interrupt:
    """The user presses Ctrl-C while this is being written."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGINT)
        return dict, ()


class Unwritable:
    def __reduce__(self):
        raise TypeError('cannot pickle this')


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize(
    ('content', 'error'), [(Interrupt, KeyboardInterrupt), (Unwritable, TypeError)]
)
def test_an_interrupted_process_leaves_nothing(file, overwrite, content, error):
    if overwrite:
        file.write_text('mine')
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error):
            write_checkpoint(CONTENT | {'last': content()}, file, overwrite)
    finally:
        signal.signal(signal.SIGINT, before)
    assert os.listdir(file.parent) == ['net.pth'] * overwrite
    assert not overwrite or file.read_text() == 'mine'


@pytest.mark.parametrize('function', [check_writable, lambda path: write_checkpoint(CONTENT, path)])
def test_no_folder_or_no_file(tmp_path, function):
    path = tmp_path / 'none' / 'net.pth'
    assert message_of(function, path) == (
        f'{path}: cannot be written: there is no folder {path.parent}'
    )
    assert message_of(function, tmp_path) == f'{tmp_path}: is a folder, expected a file name'
    assert os.listdir(tmp_path) == []


def as_nobody(function, *args):
    if os.getuid() == 0:  # to root no folder is read-only
        os.setgid(65534)
        os.setuid(65534)
    function(*args)


@pytest.mark.parametrize('function', [check_writable, lambda path: write_checkpoint(CONTENT, path)])
def test_read_only_folder(tmp_path, function):
    folder = tmp_path / 'folder'
    folder.mkdir()
    folder.chmod(0o555)
    for parent in tmp_path.parents:  # pytest's, which are the owner's alone
        if Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(parent.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)
    text = in_a_child(as_nobody, function, folder / 'net.pth')
    assert text == (
        f'CheckpointError: {folder / "net.pth"}: cannot be written: {folder} is read-only'
    )
    folder.chmod(0o755)
    assert os.listdir(folder) == []


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='no file system to fail on')
def test_a_folder_that_lies_about_being_writable():
    assert message_of(write_checkpoint, CONTENT, '/proc/net.pth').startswith(
        '/proc/net.pth: cannot be written: '
    )


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(CONTENT, 'net.pth')
    assert os.listdir(tmp_path) == ['net.pth']
