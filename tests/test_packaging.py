"""The distributions: what they contain, what they declare, and what importing the package costs."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ssn_plugin

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd):
    """Run a command and return what it printed; a failure shows its error output."""
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind, tree, out):
    """Build a 'wheel', 'sdist' or 'editable' of a tree in its own process; no network, no pip."""
    code = f'from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))'
    return Path(out, run(sys.executable, '-c', code, cwd=tree).splitlines()[-1])


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture
def tree(tmp_path):
    """A copy of what a fresh checkout holds, tests included."""
    copy = tmp_path / 'checkout'
    unwanted = shutil.ignore_patterns(
        '.*', '__pycache__', '*.egg-info', 'build', 'dist', 'work_dirs'
    )
    for path in ROOT.iterdir():
        if path.name in ('configs', 'demo_data', 'requirements', 'ssn_plugin', 'tests', 'tools'):
            shutil.copytree(path, copy / path.name, ignore=unwanted)
        elif path.is_file() and path.suffix in ('', '.cff', '.in', '.md', '.py', '.toml', '.yml'):
            copy.mkdir(exist_ok=True)
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope='module')
def metadata(tmp_path_factory):
    """The core metadata that setup.py declares."""
    out = tmp_path_factory.mktemp('metadata')
    run(sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', out, cwd=ROOT)
    return (out / 'ssn_plugin.egg-info' / 'PKG-INFO').read_text()


def test_wheel_contains_package_and_mim_folder_and_nothing_else(tree, tmp_path):
    content = names(build('wheel', tree, tmp_path))
    wanted = [
        path.relative_to(tree)
        for path in (tree / 'ssn_plugin').rglob('*')
        if path.suffix in ('.py', '.typed') or path.parent.name == 'templates'
    ]
    for folder in ('configs', 'tools'):
        files = [path for path in (tree / folder).rglob('*') if path.is_file()]
        wanted += [Path('ssn_plugin/.mim') / path.relative_to(tree) for path in files]
    assert {path.as_posix() for path in wanted} | {'ssn_plugin/.mim/model-index.yml'} <= content
    assert {name.split('/')[0].split('-')[0] for name in content} == {'ssn_plugin'}
    assert not (tree / 'ssn_plugin' / '.mim').exists()


def test_what_needs_a_clone_says_so_in_a_wheel(tree, tmp_path):
    shutil.unpack_archive(build('wheel', tree, tmp_path), tmp_path / 'installed', 'zip')
    (tmp_path / 'somewhere').mkdir()
    path = os.pathsep.join([str(tmp_path / 'installed'), os.environ.get('PYTHONPATH', '')])
    for name, argument in (
        ('make_demo_dataset.py', 'data'),
        ('make_demo_image_folder.py', 'data'),
        ('demo.py', 'det'),
    ):
        result = subprocess.run(
            [sys.executable, tmp_path / 'installed/ssn_plugin/.mim/tools' / name, argument],
            cwd=tmp_path / 'somewhere',
            env=os.environ | {'PYTHONPATH': path},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith(f'{name}: demo_data: not in {tmp_path / "installed"}')
        assert 'clone the repository' in line
    assert not list((tmp_path / 'somewhere').iterdir())


def test_wheel_from_sdist_equals_wheel_from_checkout(tree, tmp_path):
    sdist = build('sdist', tree, tmp_path)
    shutil.unpack_archive(sdist, tmp_path / 'unpacked')
    unpacked = tmp_path / 'unpacked' / sdist.name.replace('.tar.gz', '')
    from_sdist = names(build('wheel', unpacked, tmp_path / 'unpacked'))
    assert from_sdist == names(build('wheel', tree, tmp_path))


def test_editable_install_links_the_mim_folder(tree, tmp_path):
    build('editable', tree, tmp_path)
    mim = tree / 'ssn_plugin' / '.mim'
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (mim / name).is_symlink()
        assert (mim / name).samefile(tree / name)
    # a wheel built in such a checkout holds the files, once, and no links
    content = names(build('wheel', tree, tmp_path))
    assert 'ssn_plugin/.mim/tools/train.py' in content
    assert len(content) == len({name.replace('/.mim/', '/') for name in content})


def test_imported_package_has_its_mim_folder():
    mim = Path(ssn_plugin.__file__).parent / '.mim'
    assert {path.name for path in mim.iterdir()} == {'configs', 'tools', 'model-index.yml'}
    assert list((mim / 'configs').glob('coco/*.py'))


def test_a_config_of_the_package_is_a_base(tmp_path):
    """Nothing in a config is imported before its ``_base_`` is evaluated, so that imports."""
    config = tmp_path / 'mine.py'
    config.write_text(
        "_base_ = [__import__('ssn_plugin').config_path('_base_/ssn_training.py')]\n"
        'norm_cfg = _base_.ssn_norm\n'
    )
    read = pytest.importorskip('mmengine.config').Config.fromfile(config)
    assert read.norm_cfg.type in ('SSN', 'SyncSSN')
    assert read.custom_imports.imports == ['ssn_plugin']


@pytest.mark.parametrize(
    ('name', 'told'), [('_base_/ssn.py', '_base_/ssn_training.py'), ('x/y.py', 'coco')]
)
def test_a_config_that_is_not_there(name, told):
    with pytest.raises(FileNotFoundError, match=f'got {name!r}, expected .*{told}') as caught:
        ssn_plugin.config_path(name)
    assert '\n' not in str(caught.value)


def test_version_is_written_once(metadata):
    assert f'\nVersion: {ssn_plugin.__version__}\n' in metadata
    places = [
        path.relative_to(ROOT).as_posix()
        for pattern in ('*.*', 'ssn_plugin/**/*.py', 'tools/*.py', 'docs/**/*.md')
        for path in ROOT.glob(pattern)
        if path.is_file()
        and path.name != 'CHANGELOG.md'
        and re.search(
            rf'version[\W_]+{re.escape(ssn_plugin.__version__)}\b', path.read_text(), re.I
        )
    ]
    assert places == ['ssn_plugin/version.py']


def test_extras_are_what_the_requirement_files_list(metadata):
    assert re.findall(r'^Provides-Extra: (.+)$', metadata, re.M) == [
        'det',
        'seg',
        'original',
        'triton',
        'lightning',
        'accelerate',
        'deploy',
        'openvino',
        'demo',
        'docs',
        'test',
        'dev',
        'all',
    ]
    declared = re.findall(r'^Requires-Dist: (.+?); extra == "(\w+)"$', metadata, re.M)
    det = [requirement for requirement, extra in declared if extra == 'det']
    seg = [requirement for requirement, extra in declared if extra == 'seg']
    lines = (ROOT / 'requirements' / 'onedl.txt').read_text().splitlines()
    onedl = [line.split('#')[0].strip() for line in lines]
    assert set(det) | set(seg) == {line for line in onedl if line}
    assert set(det) ^ set(seg) == {
        line for line in onedl if line.startswith(('onedl-mmdet', 'onedl-mmseg'))
    }


def test_no_requirement_forces_a_package_family(metadata):
    unconditional = re.findall(r'^Requires-Dist: ([^;\n]+)$', metadata, re.M)
    assert unconditional == ['torch>=2.1']


def test_import_costs_nothing_beyond_torch_and_mmengine(tmp_path):
    loaded = 'import sys; print(*sorted({name.split(".")[0] for name in sys.modules}))'
    modules = run(
        sys.executable,
        '-c',
        'import ssn_plugin, sys; print(*[m for m in sys.modules if m.startswith("mmengine")])',
        cwd=tmp_path,
    )
    with_package = run(sys.executable, '-c', f'import ssn_plugin; {loaded}', cwd=tmp_path).split()
    host = f'import torch, {", ".join(modules.split())}; {loaded}'
    without = run(sys.executable, '-c', host, cwd=tmp_path).split()
    assert not {'mmcv', 'mmdet', 'mmseg'} & set(with_package)
    added = set(with_package) - set(without) - set(sys.stdlib_module_names)
    assert {name for name in added if not name.startswith('__editable__')} == {'ssn_plugin'}


def test_import_does_not_start_cuda(tmp_path):
    code = 'import ssn_plugin, torch; print(torch.cuda.is_initialized())'
    assert run(sys.executable, '-c', code, cwd=tmp_path).strip() == 'False'
