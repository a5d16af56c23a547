"""What a user may name as a source, and what is said of what is none."""

from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from released_files import released_file, released_state

from ssn_plugin.analysis.layer_ratios import layer_ratios, layer_ratios_of_state
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.selection_sources import rows_of

CONFIG = """
default_scope = 'mmengine'
model = dict(
    type='ToyNet', norm_cfg=dict(type='SSN', normalizers=('BN', 'LN', 'IN')))
"""


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())


@pytest.fixture
def run(make_runner):
    """The runner of a training that has ended, and its folder."""
    runner = make_runner(
        model=dict(type='ToyNet', norm_cfg=dict(type='SSN', normalizers=('BN', 'LN', 'IN')))
    )
    runner.train()
    return runner


def test_work_dir_checkpoint_and_config(run, tmp_path):
    expected = layer_ratios(run.model)
    assert all(row.decided for row in expected)
    config = tmp_path / 'config.py'
    config.write_text(CONFIG)
    folder = Path(run.work_dir)
    assert rows_of(f'{config}:{folder / "iter_12.pth"}') == expected
    # A checkpoint tells candidates by the config in it, which this runner was built without.
    assert [row.channels for row in rows_of(str(folder))] == [4, 4]
    config.write_text(CONFIG + f'load_from = {str(folder / "iter_12.pth")!r}\n')
    assert rows_of(str(config)) == expected


def test_candidates_by_the_config_in_a_checkpoint(run, tmp_path):
    path = Path(run.work_dir) / 'iter_12.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['meta']['cfg'] = CONFIG
    torch.save(checkpoint, path)
    assert rows_of(run.work_dir) == rows_of(str(path)) == layer_ratios(run.model)
    # The folder has been moved since.
    moved = tmp_path / 'moved'
    Path(run.work_dir).rename(moved)
    assert rows_of(str(moved)) == layer_ratios(run.model)


def test_candidates_by_the_meta_of_a_published_backbone(tmp_path):
    state = released_state(width=4)
    meta = dict(normalizers=['BN', 'IN', 'LN'])
    torch.save(dict(state_dict=state, meta=meta), tmp_path / 'net.pth')
    assert {row.normalizers for row in rows_of(str(tmp_path / 'net.pth'))} == {('BN', 'IN', 'LN')}


def test_released_file(tmp_path):
    rows = rows_of(released_file(tmp_path / 'ssn.pth', width=4))
    assert rows == layer_ratios_of_state(released_state(width=4))
    assert len(rows) == 20


def test_config_with_the_weights_it_starts_from(tmp_path):
    file = released_file(tmp_path / 'ssn.pth', width=4)
    config = tmp_path / 'config.py'
    config.write_text(
        "default_scope = 'mmdet'\ncustom_imports = dict(imports=['ssn_plugin'])\n"
        "model = dict(type='SSNResNet', depth=18, base_channels=4, stem_channels=4, "
        "norm_cfg=dict(type='SSN'), init_cfg=dict(type='Pretrained', "
        f'checkpoint={file!r}))\n'
    )
    expected = layer_ratios_of_state(released_state(width=4))
    found = rows_of(str(config))
    assert [row.selected for row in found] == [row.selected for row in expected]
    assert any(row.selected != ('BN', 'BN') for row in found)


@pytest.mark.parametrize(
    ('source', 'error', 'said'),
    [
        ('nothing.pth', CheckpointError, 'nothing.pth: no such file'),
        ('.', InputError, 'has no last_checkpoint, expected a work dir'),
        ('plain.pth', InputError, 'plain.pth: has no SSN or SN layers'),
        ('text.pth', CheckpointError, 'not a checkpoint of torch'),
        ('nothing.py', InputError, 'config: no such file: nothing.py'),
        ('toy.py', InputError, 'names no weights'),
        ('empty.py', InputError, 'has no model'),
        ('unknown.py', InputError, 'cannot build the model'),
        ('toy.py:nothing.pth', CheckpointError, 'nothing.pth: no such file'),
        ('toy.py:plain.pth', CheckpointError, 'does not fit toy.py: it lacks norm1.mean_weight'),
        ('toy.py:wrong.pth', CheckpointError, 'size mismatch for conv1.weight'),
    ],
)
def test_what_is_no_source(tmp_path, monkeypatch, source, error, said):
    monkeypatch.chdir(tmp_path)
    torch.save({'fc.weight': torch.ones(2, 2)}, 'plain.pth')
    torch.save({'conv1.weight': torch.ones(2, 2)}, 'wrong.pth')
    Path('text.pth').write_text('a text')
    Path('toy.py').write_text(CONFIG)
    Path('empty.py').write_text('a = 1\n')
    Path('unknown.py').write_text("model = dict(type='NoSuchModel')\n")
    with pytest.raises(error, match=said) as raised:
        rows_of(source)
    assert '\n' not in str(raised.value)
