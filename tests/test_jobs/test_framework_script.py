"""A config's scope tells whose scripts run; tools end in one line and exit code 1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.device import get_device
from tool_runs import run_here

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.framework_script import framework_script

ROOT = Path(__file__).parents[2]
CONFIG = 'configs/coco/mask-rcnn_r50_fpn_ssn-all_2x_coco.py'


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('name', ['train.py', 'test.py'])
def test_scripts_of_both_hosts(scope, name):
    script = framework_script(Config(dict(default_scope=scope)), name)
    assert script.is_file()
    assert scope in script.parts


def package(folder: Path, name: str, *scripts: str) -> None:
    """An installed package of that name, with scripts as OpenMMLab's packages ship them."""
    (folder / name / '.mim' / 'tools').mkdir(parents=True)
    (folder / name / '__init__.py').touch()
    for script in scripts:
        (folder / name / '.mim' / 'tools' / script).touch()


def test_scripts_of_any_other_package(tmp_path, monkeypatch):
    package(tmp_path, 'mmwhatever', 'train.py')
    monkeypatch.syspath_prepend(tmp_path)
    script = framework_script(Config(dict(default_scope='mmwhatever')), 'train.py')
    assert script == tmp_path / 'mmwhatever' / '.mim' / 'tools' / 'train.py'
    with pytest.raises(InputError, match=r'without its tools.*run the test\.py of its repo'):
        framework_script(Config(dict(default_scope='mmwhatever')), 'test.py')


@pytest.mark.parametrize(
    ('scope', 'told'),
    [
        (None, 'default_scope: got None'),
        ('os.path', "default_scope: got 'os.path'"),
        ('mmwhatever', 'mmwhatever is not installed: pip install mmwhatever'),
        ('mmengine', 'mmengine is installed without its tools'),
    ],
)
def test_other_scopes_are_refused(scope, told):
    with pytest.raises(InputError, match=told):
        framework_script(Config(dict(default_scope=scope)), 'train.py')


def train_with(script: str, folder: Path, monkeypatch, *options: str):
    """Run train.py on a codebase whose own train.py is this one."""
    package(folder, 'mmwhatever')
    (folder / 'mmwhatever' / '.mim' / 'tools' / 'train.py').write_text(script)
    text = "default_scope = 'mmwhatever'\nmodel = dict(type='SSN', num_features=4)"
    (folder / 'c.py').write_text(text)
    monkeypatch.setenv('PYTHONPATH', f'{folder}{os.pathsep}{ROOT}')
    command = [sys.executable, ROOT / 'tools/train.py', 'c.py', *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_options_of_the_codebase_reach_its_script(tmp_path, monkeypatch):
    """And the inputs are checked as ever."""
    script = 'import sys\nprint("ran with", *sys.argv[1:])'
    result = train_with(script, tmp_path, monkeypatch, '--sweep', '3')
    assert result.returncode == 0, result.stderr
    assert 'ran with c.py --sweep 3' in result.stdout


def test_an_error_of_the_script_before_its_work_is_one_line(tmp_path, monkeypatch):
    """As mmengine raises where the config lacks something, deep in its own code."""
    script = 'def f():\n    raise RuntimeError("provide\\nmore")\nf()'
    result = train_with(script, tmp_path, monkeypatch)
    assert result.returncode == 1
    place = tmp_path / 'mmwhatever' / '.mim' / 'tools' / 'train.py'
    expected = f'train.py: config: the run cannot be built: RuntimeError: provide ({place}, line 2)'
    assert result.stderr.splitlines()[-1] == expected
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(
    ('arguments', 'code', 'said'),
    [
        (['train.py', 'nothing.py'], 1, 'train.py: config: no such file: nothing.py'),
        (['test.py', CONFIG, 'nothing.pth'], 1, 'checkpoint: nothing.pth: no such file'),
        (['train.py', CONFIG, '--cfg-options', 'depth'], 2, 'expected KEY=VALUE'),
        (['train.py'], 2, 'required: config'),
        # values of options are not taken for the positional arguments
        (['train.py', '--launcher', 'none', 'nothing.py'], 1, 'no such file: nothing.py'),
        (
            ['test.py', CONFIG, '--show-dir', 'd', 'nothing.pth'],
            1,
            'nothing.pth: no such file',
        ),
        (
            ['test.py', '--out', 'a.pkl', CONFIG, 'b.pth'],
            1,
            'checkpoint: b.pth: no such file',
        ),
    ],
)
def test_bad_command_lines(arguments, code, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    tool, *arguments = arguments
    found, _, errors = run_here(tool, *arguments)
    assert found == code
    assert said in errors
    assert 'Traceback' not in errors


def test_missing_host_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(InputError, match='mmpretrain is not installed: pip install onedl-mmpret'):
        framework_script(Config(dict(default_scope='mmpretrain')), 'train.py')


@pytest.mark.skipif(get_device() != 'cpu', reason='there is a GPU')
def test_amp_without_a_gpu_is_one_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    code, _, errors = run_here('train.py', CONFIG, '--amp')
    assert code == 1
    assert '--amp: got no GPU, expected one' in errors
    assert 'Traceback' not in errors


def test_missing_data_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_here('train.py', str(ROOT / CONFIG))
    assert code == 1
    assert 'data/coco/annotations/instances_train2017.json' in errors
    assert 'Traceback' not in errors
    assert not (tmp_path / 'work_dirs').exists()
