"""The commit that rows of measurements carry."""

import subprocess

from ssn_plugin.engine.versions import code_version
from ssn_plugin.version import __version__


def test_commit_of_the_code(tmp_path, monkeypatch):
    assert code_version(tmp_path) == f'v{__version__}'  # no checkout

    def git(*arguments):
        identity = ['-c', 'user.name=a', '-c', 'user.email=a@b.c']
        command = ['git', *identity, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git('init')
    folder = tmp_path / 'measured'
    folder.mkdir()
    (folder / 'run.py').write_text('a')
    (folder / 'results.csv').write_text('a')
    git('add', '.')
    git('commit', '-m', 'first')
    commit = git('rev-parse', 'HEAD')[:8]
    assert code_version(folder) == commit
    other = tmp_path / 'unpacked'
    other.mkdir()
    assert code_version(other) == f'v{__version__}'  # the checkout is not of this folder
    (folder / 'results.csv').write_text('rows')  # what a measurement writes
    (folder / 'figure.svg').write_text('new')
    assert code_version(folder) == commit
    (tmp_path / 'new.py').write_text('b')
    assert code_version(folder) == f'{commit}-dirty'
    (tmp_path / 'new.py').unlink()
    (folder / 'run.py').write_text('b')
    assert code_version(folder) == f'{commit}-dirty'
    monkeypatch.setenv('PATH', '')
    assert code_version(folder) == f'v{__version__}'
