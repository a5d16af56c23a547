"""What every script in tools/ owes its users: help with an example, and errors of one line."""

import os
import re
import sys
from pathlib import Path

import pytest
from tool_runs import TOOLS, run, run_here

from ssn_plugin import __main__ as command
from ssn_plugin.torch_versions import EXPORTS_EVERY_SIZE

NAMES = sorted(path.name for path in TOOLS.iterdir() if path.suffix in ('.py', '.sh'))
SCRIPTS = [name for name in NAMES if name.endswith('.py')]

# Wrong arguments of each tool, run in a folder with a text `file` alone, its exit code, and what it
# has to say.
WRONG = {
    'analyze_selection.py': (['nothing.pth', '--out', 'out'], 1, 'nothing.pth: no such file'),
    'collapse.py': (['nothing.py', 'nothing.pth', 'out.pth'], 1, 'no such file: nothing.py'),
    'demo.py': (['det', '--work-dir', 'file'], 1, 'work_dir: cannot make file'),
    'dist_test.sh': (['config.py', 'nothing.pth', 'many'], 2, "got NPROC 'many'"),
    'dist_train.sh': (['config.py', 'many'], 2, "got NPROC 'many'"),
    'export_onnx.py': (
        ['nothing.py', 'nothing.pth', 'out.onnx'],
        1,
        'config: no such file: nothing.py' if EXPORTS_EVERY_SIZE else 'expected 2.6 or newer',
    ),
    'inspect_checkpoint.py': (['file'], 1, 'file: truncated, or not a checkpoint'),
    'make_demo_dataset.py': (['file'], 1, 'file is a file'),
    'make_demo_image_folder.py': (['file'], 1, 'file is a file'),
    'plot_ratio_history.py': (['nowhere', '--gif'], 1, 'nowhere/ratios.jsonl: no such file'),
    'publish_backbone.py': (['nothing.pth', 'out.pth'], 1, 'nothing.pth: no such file'),
    'report.py': (['nowhere', '--out', 'out.html'], 1, 'no such folder: nowhere'),
    'setup_env.py': (['--venv', 'file'], 1, 'file is a file, expected a folder'),
    'test.py': (['nothing.py', 'nothing.pth'], 1, 'config: no such file: nothing.py'),
    'test_torch_versions.py': (['--folder', 'file'], 1, 'no such folder: file'),
    'train.py': (['nothing.py', '--work-dir', 'out'], 1, 'config: no such file: nothing.py'),
    'warm_start.py': (['file', 'out.pth'], 1, 'file: truncated, or not a checkpoint'),
}


def test_the_readme_says_what_each_is_for():
    assert sorted(re.findall(r'`(\w+\.(?:py|sh))`', (TOOLS / 'README.md').read_text())) == NAMES


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_has_an_example(name):
    code, out, _ = run_here(name, '--help')
    assert code == 0
    after_usage = out[out.index('\n\n') :]
    assert re.search(rf'(python3? )?tools/{re.escape(name)}\s+\S', after_usage), after_usage


@pytest.mark.parametrize('name', SCRIPTS)
def test_wrong_usage_exits_with_2(name):
    code, out, err = run_here(name, '--no-such-option')
    assert (code, out) == (2, '')
    assert err.startswith(f'usage: {name} ')
    assert err.splitlines()[-1].startswith(f'{name}: error: ')


def assert_one_line(name: str, code: int, out: str, err: str) -> None:
    _, expected, said = WRONG[name]
    assert code == expected, err
    assert 'Traceback' not in err
    lines = [line for line in err.splitlines() if not line.startswith('usage: ')]
    assert len(lines) == 1, err
    assert re.match(rf'{Path(name).stem}(\.py|\.sh)?: ', lines[0])
    assert said in lines[0]
    assert out == ''
    assert os.listdir() == ['file']


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a text in it that is nothing else."""
    (tmp_path / 'file').write_text('a text')
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures('folder')
@pytest.mark.parametrize('name', NAMES)
def test_an_error_is_one_line(name):
    assert name in WRONG, f'tools/{name}: give it wrong arguments and what it says to them in WRONG'
    here = name.endswith('.py') and name != 'setup_env.py'
    assert_one_line(name, *(run_here if here else run)(name, *WRONG[name][0]))


@pytest.mark.usefixtures('folder')
@pytest.mark.parametrize('name', command.tools())
def test_it_ends_in_the_same_way_without_a_clone(name, monkeypatch):
    arguments, code, _ = WRONG[f'{name}.py']
    monkeypatch.setattr(sys, 'argv', ['ssn_plugin', name, *arguments])
    monkeypatch.setattr(os, 'environ', os.environ.copy())
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert (1 if isinstance(stop.value.code, str) else stop.value.code) == code


@pytest.mark.usefixtures('folder')
def test_a_process_says_the_same():
    # Or what run_here() does at the end may be another thing than what Python does.
    result = run('report.py', *WRONG['report.py'][0])
    assert_one_line('report.py', *result)
    assert result == run_here('report.py', *WRONG['report.py'][0])
