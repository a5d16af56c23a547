"""The sums of the released files, and the check of the one name that is known."""

import hashlib

import pytest

from ssn_plugin.checkpoint import release
from ssn_plugin.checkpoint.release import RELEASES, Release, released
from ssn_plugin.errors import CheckpointError

NAME = 'ssn_8x2_75.848.pth'


def test_the_table_is_that_of_the_release():
    assert {md5: (row.batch, row.top1, row.name) for md5, row in RELEASES.items()} == {
        '5c9fb111577b040e62461db51ffce69b': ((8, 32), 77.25, None),
        'd7085632529a9b1945a28a4d3bf4cacb': ((8, 16), 76.98, None),
        'af85a39920644421fc48e216aba6ff0e': ((8, 8), 76.75, None),
        '949d4bd54a7c63a3371b941eb4d3ea69': ((8, 4), 76.07, None),
        'dadb0f1a0c49c31aedd6cb83d4996a03': ((8, 2), 75.85, NAME),
    }


def test_a_file_of_one_s_own(tmp_path):
    path = tmp_path / 'mine.pth'
    path.write_bytes(b'content')
    assert released(path) is None
    assert released(str(path)) is None


@pytest.mark.parametrize('content', [b'', b'content'])
def test_another_file_under_the_released_name(tmp_path, content):
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        released(path)
    text = str(caught.value)
    assert text.startswith(f'{path}: MD5 is {hashlib.md5(content).hexdigest()}, but the released')
    assert 'dadb0f1a0c49c31aedd6cb83d4996a03' in text
    assert '\n' not in text


@pytest.mark.parametrize('name', [NAME, 'renamed.pth'])
def test_a_released_file_is_known_by_its_sum(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b'content')
    row = Release((8, 2), 75.85, NAME)
    monkeypatch.setattr(release, 'RELEASES', {hashlib.md5(b'content').hexdigest(): row})
    assert released(path) == row
