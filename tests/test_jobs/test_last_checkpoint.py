"""What a work dir names as its last checkpoint, and files of that name that name nothing."""

import pytest

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.last_checkpoint import last_checkpoint


def test_the_name_is_taken_as_it_is(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / 'nowhere') is None
    (tmp_path / 'last_checkpoint').write_text('work dirs/a/iter_4.pth\n')
    assert last_checkpoint(str(tmp_path)) == 'work dirs/a/iter_4.pth'


@pytest.mark.parametrize(
    'content',
    [b'', b' \n', b'\xff\xfe\x00', bytes(range(256)), b'a.pth\nb.pth', b'a\x00b', b'\x80'],
)
def test_what_names_nothing_is_one_line(tmp_path, content):
    (tmp_path / 'last_checkpoint').write_bytes(content)
    with pytest.raises(InputError) as caught:
        last_checkpoint(tmp_path)
    assert str(caught.value).startswith(f'{tmp_path}/last_checkpoint: ')
    assert str(caught.value).isprintable()


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / 'last_checkpoint').mkdir()
    with pytest.raises(InputError, match='cannot read it: Is a directory'):
        last_checkpoint(tmp_path)
