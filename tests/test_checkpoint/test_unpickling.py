"""No code of a file is run, whoever reads it and however; what a training keeps is read."""

import contextlib
import io
import os
import pickle
import random
import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from pickled_code import Marker
from released_files import save

from ssn_plugin import torch_versions
from ssn_plugin.checkpoint.files import read_checkpoint, without_stand_ins
from ssn_plugin.checkpoint.unpickling import refuse_code, weights_only
from ssn_plugin.errors import CheckpointError

FORCES = ('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_WEIGHTS_ONLY_LOAD')
SERIALISATION = pytest.mark.parametrize('legacy', [True, False], ids=['legacy', 'zip'])


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in (*FORCES, 'SSN_ALLOW_PICKLE'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=[True, False], ids=['torch', 'restricted pickle'], autouse=True)
def by_torch(request, monkeypatch):
    """Both ways to read weights alone: torch's own, and that for torch before 2.6."""
    if request.param and torch_versions.VERSION < (2, 6):
        pytest.skip('torch before 2.6')
    if not request.param:
        monkeypatch.setattr(torch_versions, 'VERSION', (2, 1))
    return request.param


@pytest.fixture
def file(tmp_path):
    return tmp_path / 'net.pth'


# Before 2.5 torch has no list of what is allowed.
allowed = getattr(torch.serialization, 'safe_globals', contextlib.nullcontext)


def safe_globals() -> set:
    return set(getattr(torch.serialization, 'get_safe_globals', list)())


def message_of(function, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*args, **kwargs)
    assert '\n' not in str(caught.value)
    return str(caught.value)


class Opaque:
    """A class of a training script."""


@SERIALISATION
@pytest.mark.parametrize(
    ('content', 'named'),
    [
        (Opaque(), rf'{Opaque.__module__}\.Opaque'),
        (Fraction(1, 3), r'fractions\.Fraction'),
        (torch.nn.Linear(2, 2), r'torch\.nn\.modules\.linear\.Linear'),
    ],
    ids=['class', 'standard library', 'module'],
)
def test_objects_are_refused_by_name(file, legacy, content, named):
    path = save({'state_dict': {'a': torch.ones(1)}, 'extra': content}, file, legacy)
    with pytest.raises(CheckpointError, match=rf'holds a pickled {named} and') as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert text.startswith(f'{path}: refused, because reading it would run code')
    assert 'set SSN_ALLOW_PICKLE=1 or give a tool --allow-pickle' in text
    assert '\n' not in text
    assert type(read_checkpoint(path, allow_pickle=True)['extra']) is type(content)


@SERIALISATION
@pytest.mark.parametrize('forced', [None, '0', '1', 'true', 'y'])
def test_code_is_not_run(file, tmp_path, monkeypatch, legacy, forced):
    if forced is not None:
        monkeypatch.setenv(FORCES[0], forced)
    path = save({'state_dict': {'a': torch.ones(1)}, 'x': Marker(tmp_path / 'ran')}, file, legacy)
    assert 'a pickled posix.system and' in message_of(read_checkpoint, path)
    assert not (tmp_path / 'ran').exists()
    assert os.environ.get(FORCES[0]) == forced
    assert FORCES[1] not in os.environ


@pytest.mark.parametrize('payload', ['optimizer', 'key', 'state_dict', 'file'])
def test_code_is_not_run_wherever_it_hides(file, tmp_path, payload):
    marker = Marker(tmp_path / 'ran')
    content = {
        'optimizer': {'state_dict': {'a': torch.ones(1)}, 'optimizer': {'state': [marker]}},
        'key': {'state_dict': {'a': torch.ones(1)}, ('b', marker): 1},
        'state_dict': {'state_dict': marker},
        'file': marker,
    }[payload]
    assert 'refused' in message_of(read_checkpoint, save(content, file))
    assert not (tmp_path / 'ran').exists()


class Getattr:
    """Asks for an attribute of what stands beside weights, as log histories of mmengine do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return getattr, (np.dtype('f8'), 'descr')


def test_what_is_let_through_is_never_called(file):
    """Names that a training needs are let through as things that do nothing."""
    read = read_checkpoint(save({'a': Getattr(file), 'b': np.float64(3), 'c': torch.ones(2)}, file))
    assert not isinstance(read['b'], np.generic)
    assert not isinstance(read['a'], list)
    assert torch.equal(read['c'], torch.ones(2))


def test_pickles_that_call_what_is_let_through_twice(file, tmp_path):
    """getattr(numpy.ndarray, ...)(...) by hand: what stands for getattr gives nothing to call."""
    call = (
        b'\x80\x02cbuiltins\ngetattr\ncnumpy\nndarray\nX\x06\x00\x00\x00tofile\x86R'
        b'X\x04\x00\x00\x00name\x85R.'
    )
    file.write_bytes(call)
    message_of(read_checkpoint, file)


@pytest.mark.parametrize(
    ('value', 'allowed'), [('1', True), ('yes', True), ('0', False), ('', False)]
)
@pytest.mark.parametrize('forced', [None, *FORCES])
def test_the_flag_overrides(file, tmp_path, monkeypatch, value, allowed, forced):
    if forced:
        monkeypatch.setenv(forced, '1')
    monkeypatch.setenv('SSN_ALLOW_PICKLE', value)
    path = save({'a': torch.ones(1), 'x': Marker(tmp_path / 'ran')}, file)
    if allowed:
        assert read_checkpoint(path)['x'] == 0  # what os.system gave
    else:
        assert 'refused' in message_of(read_checkpoint, path)
    assert (tmp_path / 'ran').exists() == allowed
    assert [os.environ.get(name) for name in FORCES] == [
        '1' if name == forced else None for name in FORCES
    ]


@pytest.mark.parametrize('forced', [None, *FORCES])
def test_the_argument_overrides(file, tmp_path, monkeypatch, forced):
    if forced:
        monkeypatch.setenv(forced, '1')
    read_checkpoint(save({'x': Marker(tmp_path / 'ran')}, file), allow_pickle=True)
    assert (tmp_path / 'ran').exists()


@pytest.mark.parametrize('allow', [True, False])
@pytest.mark.parametrize('before', [{}, {FORCES[0]: '1'}, {FORCES[1]: '1'}, {FORCES[0]: '0'}])
def test_everything_is_as_before_afterwards(file, monkeypatch, allow, before):
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    saved = dict(os.environ), torch.load, torch.serialization.load
    with allowed([Fraction]):
        safe = safe_globals()
        with weights_only(allow):
            torch.load(save({'a': torch.ones(1)}, file))
            assert torch.load is not saved[1]
        with pytest.raises(CheckpointError), weights_only(allow):
            torch.load(io.BytesIO(b'nothing'))
        assert safe_globals() == safe
    assert (dict(os.environ), torch.load, torch.serialization.load) == saved


def ways_to_load(path: str) -> dict:
    """As frameworks and their users load."""
    stream = io.BytesIO(Path(path).read_bytes())
    return {
        'plain': lambda: torch.load(path),
        'a path': lambda: torch.load(Path(path)),
        'positional': lambda: torch.load(path, 'cpu', pickle),
        'unpickling': lambda: torch.load(path, weights_only=False),
        'by its module': lambda: torch.serialization.load(path, pickle_module=pickle),
        'a stream': lambda: torch.load(stream, map_location='cpu'),
        'what is allowed': lambda: load_with_safe_globals(path),
        'old strings': lambda: torch.load(path, weights_only=False, encoding='latin1'),
        'hub': lambda: torch.hub.load_state_dict_from_url(f'file://{path}', str(Path(path).parent)),
        'mmengine': lambda: pytest.importorskip('mmengine.runner').CheckpointLoader.load_checkpoint(
            path, logger='silent'
        ),
    }


def load_with_safe_globals(path: str) -> object:
    with allowed([os.system, (os.system, 'posix.system'), getattr]):
        return torch.load(path, weights_only=True)


@SERIALISATION
@pytest.mark.parametrize('way', ways_to_load(__file__))
@pytest.mark.parametrize('whole_run', [True, False], ids=['process', 'block'])
def test_it_binds_everyone_who_loads(file, tmp_path, legacy, way, whole_run):
    path = save({'x': Marker(tmp_path / 'ran')}, file, legacy)
    block = contextlib.nullcontext() if whole_run else weights_only()
    if whole_run:
        refuse_code()
    with block:
        text = message_of(ways_to_load(path)[way])
    assert 'refused, because reading it would run code: it holds a pickled posix.system' in text
    assert not (tmp_path / 'ran').exists()


def test_a_process_may_trust_its_files(file, tmp_path, monkeypatch):
    refuse_code()
    monkeypatch.setenv('SSN_ALLOW_PICKLE', '1')
    torch.load(save({'x': Marker(tmp_path / 'ran')}, file), weights_only=True)
    assert (tmp_path / 'ran').exists()


def test_a_block_within_a_process_that_refuses(file, tmp_path):
    """A tool that was told to trust a file trusts no other."""
    refuse_code()
    path = save({'x': Marker(tmp_path / 'ran'), 'n': np.float64(3)}, file)
    with weights_only(allow_pickle=True):
        assert torch.load(path)['n'] == 3
    (tmp_path / 'ran').unlink()
    message_of(torch.load, path)
    assert not (tmp_path / 'ran').exists()


# ---------------------------------------------------------------- what a training keeps


def kept_by_a_run() -> dict:
    """What mmengine and its hooks put beside the weights, and what users put into metainfo."""
    logging = pytest.importorskip('mmengine.logging')
    config = pytest.importorskip('mmengine.config')
    history = logging.HistoryBuffer([0.5, 2.5], [1, 1])
    arrays = [np.arange(6).reshape(2, 3).astype(code) for code in '?bBhHiIlLqQefdFD']
    return {
        'state_dict': {'a': torch.ones(1)},
        'meta': {
            'dataset_meta': config.ConfigDict(
                classes=('a', 'b'), palette=[[1, 2, 3]], of=dict(split=dict(train=[1, dict(b=2)]))
            ),
            'keypoints': dict(sigmas=np.array([0.25, 0.5]), names=np.array(['nose', 'ear'])),
        },
        'message_hub': {'log_scalars': {'train/loss': history}, 'best': np.float32(0.5)},
        'arrays': arrays,
        'random': (random.Random(3).getstate(), np.random.RandomState(3).get_state()),
        'slice': slice(1, 5, 2),
        'bytes': b'abc',
    }


@SERIALISATION
def test_a_run_is_resumed_with_what_it_kept(file, legacy):
    kept = kept_by_a_run()
    refuse_code()
    read = torch.load(save(kept, file, legacy))
    history = read['message_hub']['log_scalars']['train/loss']
    assert type(history) is type(kept['message_hub']['log_scalars']['train/loss'])
    assert [history.statistics(name) for name in ('mean', 'min', 'max', 'current')] == [
        1.5, 0.5, 2.5, 2.5
    ]  # fmt: skip
    history.update(3.5)
    assert history.max() == 3.5
    meta = read['meta']['dataset_meta']
    assert type(meta) is type(kept['meta']['dataset_meta'])
    assert meta == kept['meta']['dataset_meta']
    assert meta.of.split.train[1].b == 2
    for ours, theirs in zip(read['arrays'], kept['arrays'], strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours == theirs).all()
    assert list(read['meta']['keypoints']['names']) == ['nose', 'ear']
    assert read['message_hub']['best'] == np.float32(0.5)
    random.Random().setstate(read['random'][0])
    np.random.RandomState().set_state(read['random'][1])
    assert (read['slice'], read['bytes']) == (slice(1, 5, 2), b'abc')


@SERIALISATION
def test_metainfo_is_read_as_plain_dicts(file, legacy):
    """By tools that look at a checkpoint, which need no mmengine."""
    read = read_checkpoint(save(kept_by_a_run(), file, legacy))
    meta = without_stand_ins(read['meta'])
    assert meta == {
        'dataset_meta': {
            'classes': ('a', 'b'),
            'palette': [[1, 2, 3]],
            'of': {'split': {'train': [1, {'b': 2}]}},
        },
        'keypoints': {},
    }
    assert type(meta['dataset_meta']['of']['split']) is dict


class Reaching:
    """Asks for an attribute of something that a run may keep."""

    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return getattr, self.what


def test_a_history_gives_its_statistics_and_nothing_else(file):
    """mmengine allows getattr, by which one comes from there to the globals of modules."""
    history = pytest.importorskip('mmengine.logging').HistoryBuffer
    refuse_code()
    assert torch.load(save({'a': Reaching(history, 'mean')}, file))['a'] is history.mean
    for owner, name in (
        (history, '__init__'),
        (history, 'register_statistics'),
        (np.ndarray, 'max'),
        (history(), 'mean'),
    ):
        path = save({'a': Reaching(owner, name)}, file)
        for way, load in ways_to_load(path).items():
            if way != 'hub':  # keeps the first file
                assert 'a pickled builtins.getattr' in message_of(load), (way, name)


def test_the_text_of_a_config_is_not_handed_on(file):
    """mmengine would run it as a program when it resumes."""
    text = 'import os'
    path = save({'meta': {'config': text, 'cfg': text, 'epoch': 3}, 'state_dict': {}}, file)
    refuse_code()
    assert torch.load(path)['meta'] == {'cfg': text, 'epoch': 3}
    for content in ({'meta': 'text'}, {'meta': None}, [1], torch.ones(1)):
        torch.load(save(content, file))


# ---------------------------------------------------------------- what is no checkpoint


def test_archives_are_refused_before_they_are_opened(file, tmp_path):
    network = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(network, file)
    assert 'is a TorchScript archive' in message_of(read_checkpoint, file)
    refuse_code()
    assert 'is a TorchScript archive' in message_of(torch.load, io.BytesIO(file.read_bytes()))
    with tarfile.open(file, 'w') as archive:
        archive.add(__file__, 'storages')
    for load in (read_checkpoint, torch.load):
        assert 'is a tar archive' in message_of(load, file)


def test_a_stream_is_read_from_where_it_stands(file):
    stream = io.BytesIO(b'12345')
    stream.seek(5)
    torch.save({'a': torch.ones(1)}, stream, _use_new_zipfile_serialization=False)
    stream.seek(5)
    refuse_code()
    assert torch.load(stream)['a'] == 1


def test_a_missing_file_is_what_it_always_was(tmp_path):
    refuse_code()
    with pytest.raises(FileNotFoundError):
        torch.load(tmp_path / 'none.pth')


def test_map_location_and_mmap_are_handed_on(file):
    refuse_code()
    path = save({'a': torch.ones(1)}, file)
    assert torch.load(path, 'meta')['a'].is_meta
    assert torch.load(path, map_location='meta', mmap=True)['a'].is_meta
