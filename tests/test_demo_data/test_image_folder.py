"""make_image_folder and its tool: classes, what is held out, same bytes, all or nothing."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from tool_runs import run_here

from demo_data import CLASSES, make_demo_dataset, make_image_folder

TOOL = 'make_demo_image_folder.py'
TINY = dict(num_train=2, num_val=1, size=32)


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob('*')
        if path.is_file()
    }


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('images') / 'imagefolder'
    assert make_image_folder(out, num_train=4, num_val=4)
    return out


def test_classes_are_those_of_both_splits(folder):
    train, val = (sorted(path.name for path in (folder / s).iterdir()) for s in ('train', 'val'))
    assert train == val
    assert set(CLASSES) < set(train)
    assert len(train) == 11
    for picture in folder.rglob('*.jpg'):
        with Image.open(picture) as image:
            assert image.size == (64, 64)
            assert np.asarray(image.convert('L')).std() > 0.5, picture  # never blank
    assert len(list(folder.rglob('*.jpg'))) == 11 * 8


def test_no_picture_is_there_twice(folder):
    found = [digest for name, digest in digests(folder).items() if name.endswith('.jpg')]
    assert len(set(found)) == len(found)


def test_objects_are_of_their_split(tmp_path, monkeypatch):
    from demo_data import scenes

    posed = []
    pose = scenes.pose

    def note(cutout, side, rng):
        posed.append(cutout.name)
        return pose(cutout, side, rng)

    monkeypatch.setattr(scenes, 'pose', note)
    make_image_folder(tmp_path / 'set', num_train=30, num_val=20, size=32)
    train, val = set(posed[: 4 * 30]), set(posed[4 * 30 :])
    assert len(posed) == 4 * 50  # textures have none
    assert train & val == {'cup'}  # of which there is one photograph
    assert len(train) > 15


def test_same_settings_give_the_same_bytes_and_others_do_not(tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        make_image_folder(tmp_path / name, seed=seed, **TINY)
    a, b, c = (digests(tmp_path / name) for name in 'abc')
    assert a == b
    assert a.keys() == c.keys()
    assert not set(a.values()) & set(c.values())


def test_a_finished_folder_is_left_alone_and_others_are_not_taken_for_it(tmp_path):
    out = tmp_path / 'set'
    assert make_image_folder(out, **TINY)
    before = digests(out)
    assert not make_image_folder(out, **TINY)
    with pytest.raises(FileExistsError, match='other settings'):
        make_image_folder(out, seed=5, **TINY)
    with pytest.raises(FileExistsError, match='other settings'):
        make_demo_dataset(out, num_train=1, num_val=1, size=96)
    assert digests(out) == before
    assert make_image_folder(out, seed=5, overwrite=True, **TINY)
    assert digests(out) != before


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('demo_data.image_folder.write_record', interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_image_folder(tmp_path / 'set', **TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('argument', 'value'),
    [('num_train', 0), ('num_val', 1.5), ('size', 16), ('size', 640), ('seed', -1)],
)
def test_bad_numbers_are_named(tmp_path, argument, value):
    with pytest.raises(ValueError, match=rf'{argument} must be .* got {value}'):
        make_image_folder(tmp_path / 'set', **{**TINY, argument: value})
    assert not list(tmp_path.iterdir())


def test_tool_writes_and_then_finds_the_folder(tmp_path):
    arguments = [str(tmp_path / 'set'), '--train', '1', '--val', '1', '--size', '32']
    status, out, err = run_here(TOOL, *arguments)
    assert (status, err) == (0, '')
    assert '1 + 1 pictures per class written' in out
    assert 'already holds' in run_here(TOOL, *arguments)[1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['{folder}/set', '--train', '0'], 'num_train must be'),
        (['{folder}/file'], 'is a file'),
        (['{folder}'], 'holds no demo data set'),
    ],
)
def test_tool_says_what_is_wrong_in_one_line(tmp_path, arguments, message):
    (tmp_path / 'file').write_text('')
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    status, out, err = run_here(TOOL, *arguments)
    assert (status, out) == (1, '')
    assert err.startswith('make_demo_image_folder.py: ')
    assert message in err
    assert err.count('\n') == 1
