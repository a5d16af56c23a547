"""The command-line tools that show what layers chose."""

import csv
from pathlib import Path

import pytest
import torch
from released_files import released_file, released_state
from tool_runs import run_here
from training_folder import work_dir

from ssn_plugin.analysis.layer_ratios import layer_ratios_of_state


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_analyze_selection_of_one_checkpoint(tmp_path):
    file = released_file(tmp_path / 'ssn.pth', width=4, undecided=0.3, radius=0.5)
    code, out, err = run_here('analyze_selection.py', file)
    assert (code, err) == (0, '')
    rows = layer_ratios_of_state(released_state(width=4, undecided=0.3, radius=0.5))
    lines = [line for line in out.splitlines() if line.startswith('│')]
    assert len(lines) == len(rows) == 20
    for line, row in zip(lines, rows, strict=True):
        for selected, cell in zip(row.selected, line.split('│')[5:7], strict=True):
            assert cell.split() == [selected] if selected else len(cell.split()) == 6
    assert names(tmp_path) == {'ssn.pth'}


def test_analyze_selection_compares(tmp_path):
    first = released_file(tmp_path / 'a.pth', width=4)
    state = released_state(width=4)
    state['layer2.0.sn1.mean_weight'] = state['layer2.0.sn1.mean_weight'].roll(1)
    torch.save({f'backbone.{key}': value for key, value in state.items()}, tmp_path / 'b.pth')
    out_folder = tmp_path / 'out' / 'deep'
    code, out, err = run_here(
        'analyze_selection.py', first, str(tmp_path / 'b.pth'), '--names', 'before', 'after',
        '--out', str(out_folder),
    )  # fmt: skip
    assert code == 0, err
    assert '1 of 20 common layers prefer another normalizer' in out
    assert {line for line in out.splitlines() if line.startswith(str(tmp_path))} == {
        str(path) for path in out_folder.iterdir()
    }
    with (out_folder / 'comparison.csv').open(newline='') as file:
        (differing,) = (line for line in csv.DictReader(file) if line['differs'] == '1')
    assert (differing['layer'], differing['statistic']) == ('layer2.0.sn1', 'mean')
    assert 'drawing' in err


def test_wrong_names(tmp_path):
    file = released_file(tmp_path / 'a.pth', width=4)
    for arguments, said in (
        ([file, file], 'expected different ones, or --names'),
        ([file, '--names', 'a', 'b'], '--names: got 2 names, expected 1'),
    ):
        code, _, err = run_here('analyze_selection.py', *arguments)
        assert code == 2
        assert said in err


def test_report_and_history(tmp_path):
    folder = work_dir(tmp_path / 'run', 4)
    before = names(folder)
    code, out, _ = run_here('report.py', str(folder))
    assert (code, out) == (0, f'{folder / "report.html"}\n')
    code, out, err = run_here('plot_ratio_history.py', str(folder), '--gif')
    assert code == 0, err
    figures = ['history.png', 'history.svg', 'simplex.png', 'simplex.svg', 'simplex.gif']
    assert out.splitlines() == [str(folder / name) for name in figures]
    assert names(folder) == before | {*figures, 'report.html'}


def test_folder_that_cannot_be_made(tmp_path):
    folder = work_dir(tmp_path / 'run', 4)
    (tmp_path / 'file').write_text('')
    file = released_file(tmp_path / 'a.pth', width=4)
    out = str(tmp_path / 'file' / 'x')
    for name, source in (
        ('analyze_selection.py', file),
        ('plot_ratio_history.py', str(folder)),
        ('report.py', str(folder)),
    ):
        code, printed, err = run_here(name, source, '--out', out)
        assert (code, printed) == (1, ''), name
        assert err.startswith(f'{name}: ')
        assert 'Not a directory' in err
        assert err.count('\n') == 1


def test_what_cannot_be_read_is_not_called_unwritable(tmp_path):
    unreadable = Path('/proc/self/mem')  # a regular file whose reading is an error, for root too
    if not unreadable.is_file():
        pytest.skip('needs a /proc')
    folder = work_dir(tmp_path / 'run', 4)
    (folder / 'last_checkpoint').symlink_to(unreadable)
    code, printed, err = run_here('analyze_selection.py', str(folder), '--out', str(tmp_path / 'o'))
    assert (code, printed) == (1, '')
    assert err == (
        f'analyze_selection.py: {folder / "last_checkpoint"}: cannot read it: Input/output error\n'
    )
    logs = folder / '20260102_030405' / 'vis_data' / 'scalars.json'
    logs.unlink()
    logs.symlink_to(unreadable)
    code, printed, err = run_here('report.py', str(folder))
    assert (code, printed) == (1, '')
    assert err == f'report.py: {folder}: cannot read all of it: Input/output error\n'
    (folder / 'ratios.jsonl').unlink()
    (folder / 'ratios.jsonl').symlink_to(unreadable)
    for name in ('plot_ratio_history.py', 'report.py'):
        code, printed, err = run_here(name, str(folder))
        assert (code, printed) == (1, '')
        assert err == f'{name}: {folder / "ratios.jsonl"}: cannot read it: Input/output error\n'
    assert not (tmp_path / 'o').exists()
