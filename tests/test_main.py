"""python -m ssn_plugin: every tool by its name, as the script in tools/ does it."""

import subprocess
import sys

import pytest
from tool_runs import TOOLS, run

from ssn_plugin import __main__ as command

NAMES = sorted({path.stem for path in TOOLS.glob('*.py')} - set(command._OF_A_CLONE))


@pytest.mark.parametrize('arguments', [[], ['--help']], ids=str)
def test_it_lists_the_tools(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['ssn_plugin', *arguments])
    command.main()
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [words[0] for words in shown] == NAMES
    assert all(len(words) > 4 for words in shown)  # and what each is for


@pytest.mark.parametrize('name', NAMES)
def test_each_shows_its_own_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['ssn_plugin', name, '--help'])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert not stop.value.code
    assert capsys.readouterr().out.startswith(f'usage: python -m ssn_plugin {name} ')


def test_a_name_that_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['ssn_plugin', 'colapse', 'x'])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert "got 'colapse'" in capsys.readouterr().err


def test_an_installation_without_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(command, '_TOOLS', tmp_path / 'tools')
    with pytest.raises(SystemExit, match='no such folder: '):
        command.main()


def test_a_package_that_is_missing(monkeypatch):
    """As all that come with mmengine are where there is torch alone."""
    monkeypatch.setitem(sys.modules, 'rich.console', None)
    monkeypatch.setattr(sys, 'argv', ['ssn_plugin', 'collapse', 'a.py', 'b.pth', 'c.pth'])
    with pytest.raises(SystemExit, match=r'^collapse: .*rich.*mmengine'):
        command.main()


def test_it_does_what_the_script_does(tmp_path):
    (tmp_path / 'file').write_text('no checkpoint')
    arguments = ['inspect_checkpoint', str(tmp_path / 'file')]
    command = [sys.executable, '-m', 'ssn_plugin', *arguments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    script = run(f'{arguments[0]}.py', *arguments[1:])
    assert (found.returncode, found.stdout, found.stderr) == script
    assert script[0] == 1
