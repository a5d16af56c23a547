"""make_demo_dataset and its tool: same bytes every time, all or nothing, one line per error."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tool_runs import TOOLS, run_here

from demo_data import make_demo_dataset, photographs

TOOL = TOOLS / 'make_demo_dataset.py'
TINY = dict(num_train=1, num_val=1, size=96)


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob('*')
        if path.is_file()
    }


def test_same_settings_give_the_same_bytes(demo_root, num_scenes, tmp_path):
    make_demo_dataset(
        tmp_path / 'again', num_train=num_scenes['train'], num_val=num_scenes['val'], seed=0
    )
    assert digests(tmp_path / 'again') == digests(demo_root)


def test_another_seed_gives_other_pictures(tmp_path):
    make_demo_dataset(tmp_path / 'a', seed=0, **TINY)
    make_demo_dataset(tmp_path / 'b', seed=1, **TINY)
    image = 'coco/train2017/000000000001.jpg'
    assert (tmp_path / 'a' / image).read_bytes() != (tmp_path / 'b' / image).read_bytes()


def test_progress_counts_every_scene(tmp_path):
    calls = []
    make_demo_dataset(
        tmp_path / 'set', num_train=2, num_val=1, size=96, progress=lambda *call: calls.append(call)
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_readme_names_every_photograph_in_use(demo_root):
    text = (demo_root / 'README.md').read_text()
    for photograph in photographs.PHOTOGRAPHS.values():
        assert photograph.file in text
        assert photographs.photograph_path(photograph.file.split('.')[0]).is_file()
    assert 'scikit-image' in json.loads((demo_root / 'demo_data.json').read_text())['versions']


def test_a_finished_set_is_left_alone(tmp_path):
    out = tmp_path / 'set'
    assert make_demo_dataset(out, **TINY)
    before = {path: path.stat().st_mtime_ns for path in out.rglob('*')}
    assert not make_demo_dataset(out, **TINY)
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*')} == before


def test_other_settings_need_overwrite(tmp_path):
    out = tmp_path / 'set'
    make_demo_dataset(out, **TINY)
    with pytest.raises(FileExistsError, match='other settings'):
        make_demo_dataset(out, seed=5, **TINY)
    assert make_demo_dataset(out, seed=5, overwrite=True, **TINY)
    assert json.loads((out / 'demo_data.json').read_text())['settings']['seed'] == 5
    assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_foreign_files_are_never_replaced(tmp_path):
    precious = tmp_path / 'set' / 'thesis.txt'
    precious.parent.mkdir()
    precious.write_text('ten years')
    with pytest.raises(FileExistsError, match='holds no demo data set'):
        make_demo_dataset(precious.parent, overwrite=True, **TINY)
    with pytest.raises(FileExistsError, match='is a file'):
        make_demo_dataset(precious, overwrite=True, **TINY)
    assert precious.read_text() == 'ten years'


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / 'set').mkdir()
    assert make_demo_dataset(tmp_path / 'set', **TINY)


@pytest.mark.parametrize('existing', [False, True])
def test_an_interruption_leaves_everything_as_it_was(tmp_path, existing):
    out = tmp_path / 'set'
    if existing:
        make_demo_dataset(out, **TINY)
    before = digests(tmp_path)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_demo_dataset(out, seed=7, overwrite=True, progress=interrupt, **TINY)
    assert digests(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (['set'] if existing else [])


@pytest.mark.parametrize(
    ('argument', 'value'),
    [
        ('num_train', 0),
        ('num_val', -3),
        ('num_train', 1.5),
        ('num_train', True),
        ('size', 100),
        ('size', 64),
        ('size', 640),
        ('seed', -1),
    ],
)
def test_bad_numbers_are_named(tmp_path, argument, value):
    with pytest.raises(ValueError, match=rf'{argument} must be .* got {value}'):
        make_demo_dataset(tmp_path / 'set', **{**TINY, argument: value})
    assert not list(tmp_path.iterdir())


def test_missing_scikit_image(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'skimage', None)
    with pytest.raises(ImportError, match=r"pip install 'scikit-image>=0\.25'"):
        make_demo_dataset(tmp_path / 'set', **TINY)
    assert not list(tmp_path.iterdir())


def test_missing_photograph(tmp_path, monkeypatch):
    moon = photographs.PHOTOGRAPHS['moon']
    lost = photographs.Photograph('lost.png', moon.subject, moon.origin, moon.licence)
    monkeypatch.setitem(photographs.PHOTOGRAPHS, 'moon', lost)
    with pytest.raises(FileNotFoundError, match=r'lost\.png is missing: reinstall scikit-image'):
        make_demo_dataset(tmp_path / 'set', **TINY)
    assert not list(tmp_path.iterdir())


def test_tool_writes_and_then_finds_the_set(tmp_path):
    arguments = [str(tmp_path / 'set'), '--train', '1', '--val', '1', '--size', '96']
    status, out, err = run_here(TOOL.name, *arguments)
    assert status == 0
    assert '1 + 1 scenes written' in out
    assert 'scenes: 2/2' in err
    status, out, _ = run_here(TOOL.name, *arguments)
    assert status == 0
    assert 'already holds' in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['{folder}/set', '--train', '0'], 'num_train must be'),
        (['{folder}/set', '--size', '100'], 'size must be a multiple of 32'),
        (['{folder}/file/set', '--size', '96'], 'cannot write to'),
        (['{folder}/file'], 'is a file'),
        (['{folder}'], 'holds no demo data set'),
    ],
)
def test_tool_says_what_is_wrong_in_one_line(tmp_path, arguments, message):
    (tmp_path / 'file').write_text('')
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    status, out, err = run_here(TOOL.name, *arguments)
    assert status == 1
    assert out == ''
    assert err.startswith('make_demo_dataset.py: ')
    assert message in err
    assert err.count('\n') == 1
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_tool_works_in_any_folder(tmp_path):
    arguments = ['data', '--train', '1', '--val', '1', '--size', '96']
    subprocess.run([sys.executable, TOOL, *arguments], check=True, cwd=tmp_path)
    assert (tmp_path / 'data/coco/val2017').is_dir()


def test_tool_help_has_an_example():
    help_text = subprocess.run(
        [sys.executable, TOOL, '--help'], capture_output=True, text=True, check=True
    ).stdout
    assert 'example: python tools/make_demo_dataset.py' in help_text


def test_importing_the_plugin_does_not_import_this():
    code = "import sys, ssn_plugin; assert 'demo_data' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=TOOL.parents[1])


def test_the_package_needs_neither_mmdet_nor_mmseg():
    folder = Path(photographs.__file__).parent
    for path in folder.glob('*.py'):
        lines = path.read_text().splitlines()
        imports = [
            line.split()[1] for line in lines if line.strip().startswith(('import ', 'from '))
        ]
        roots = {name.split('.')[0] for name in imports}
        assert not roots & {'torch', 'mmcv', 'mmengine', 'mmdet', 'mmseg', 'cv2', 'pycocotools'}
