"""The one writer: files are there whole or not at all, on every system."""

import errno
import os
import resource
from pathlib import Path

import pytest

from ssn_plugin.checkpoint.whole_file import whole_file


def write(path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def names_in(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / 'file'
    write(path, b'first')
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            write(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b'first'
    assert names_in(tmp_path) == ['file']
    write(path, bytes(2000))
    assert path.read_bytes() == bytes(2000)


def test_an_error_in_the_block_leaves_what_was_there(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')

    def fail(temporary):
        temporary.write_text('half')
        raise RuntimeError('stop')

    with pytest.raises(RuntimeError, match='stop'), whole_file(path) as temporary:
        fail(temporary)
    assert path.read_text() == 'old'
    assert names_in(tmp_path) == ['file']


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, whole_file(tmp_path / 'file') as temporary:
        temporary.write_bytes(Path(tmp_path, 'source').read_bytes())
    assert caught.value.filename == str(tmp_path / 'source')


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / 'file'
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text('of the first')
        second.write_text('of the second')
    assert path.read_text() == 'of the first'  # which was renamed last
    assert names_in(tmp_path) == ['file']


def test_content_and_name_are_synced(tmp_path, monkeypatch):
    """The content before the file gets its name, and the folder after it."""
    synced = []

    def sync(handle: int) -> None:
        place = os.readlink(f'/proc/self/fd/{handle}')
        synced.append((Path(place).name, (tmp_path / 'file').exists()))

    monkeypatch.setattr(os, 'fsync', sync)
    write(tmp_path / 'file', b'content')
    (content, before), (folder, after) = synced
    assert content.startswith('file.')
    assert content.endswith('.incomplete')
    assert (folder, before, after) == (tmp_path.name, False, True)


def test_a_folder_that_cannot_be_opened(tmp_path, monkeypatch):
    """As every folder of Windows, and folders that a user may write to and not list."""
    opens = os.open

    def refuse(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opens(path, *args, **kwargs)

    monkeypatch.setattr(os, 'open', refuse)
    write(tmp_path / 'file', b'content')
    assert (tmp_path / 'file').read_bytes() == b'content'


@pytest.mark.parametrize(('code', 'fails'), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, code, fails):
    """Some network file systems cannot; but where the disk is broken it has to be said."""
    syncs = os.fsync

    def refuse(handle: int) -> None:
        if os.path.isdir(f'/proc/self/fd/{handle}'):
            raise OSError(code, os.strerror(code))
        syncs(handle)

    monkeypatch.setattr(os, 'fsync', refuse)
    if fails:
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            write(tmp_path / 'file', b'content')
        assert caught.value.filename == str(tmp_path / 'file')
    else:
        write(tmp_path / 'file', b'content')
    assert names_in(tmp_path) == ['file']


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / 'plain').write_bytes(b'')
    write(tmp_path / 'ours', b'')
    assert (tmp_path / 'ours').stat().st_mode == (tmp_path / 'plain').stat().st_mode
