"""FSDP by the recipe of docs/distributed.md equals DDP; SyncBuffersHook keeps selections."""

import math

import pytest
import torch
from processes import run_processes

pytest.importorskip('torch.distributed.device_mesh')  # torch 2.2
from sharded_training import STEPS, run_all

WORLD = 2


@pytest.fixture(scope='module')
def found(tmp_path_factory) -> list[dict]:
    return run_processes(run_all, WORLD, tmp_path_factory.mktemp('processes'), seconds=120)


@pytest.mark.parametrize('version', ['fsdp1', 'fsdp2'])
@pytest.mark.parametrize('kind', ['SSN', 'SyncSSN'])
def test_sharded_training_equals_replicated(kind, version, found):
    for process in found:
        ours, theirs = process[kind, version], process[kind, 'ddp']
        assert ours['selected'] == theirs['selected']
        assert ours['losses'] == pytest.approx(theirs['losses'], rel=1e-5)
        for name, value in theirs['state'].items():
            torch.testing.assert_close(ours['state'][name], value, rtol=1e-5, atol=1e-6, msg=name)
        # and it was sharded: a process holds little more than its share
        assert ours['numbers'] < 0.6 * theirs['numbers']


@pytest.mark.parametrize('version', ['ddp', 'fsdp1', 'fsdp2'])
@pytest.mark.parametrize('kind', ['SSN', 'SyncSSN'])
def test_processes_agree(kind, version, found):
    first, second = [process[kind, version] for process in found]
    assert first['losses'] != second['losses']  # data differ
    assert first['selected'] == second['selected']
    assert len(set(first['selected'])) > 1
    assert not any(None in pair for pair in first['selected'])
    for name, value in first['state'].items():
        shared = 'running' not in name or kind == 'SyncSSN'
        assert torch.equal(value, second['state'][name]) == shared, name


def test_layers_in_shards_are_refused_in_words(found):
    for process in found:
        for text in process['refusals']:
            assert 'expected shape (3,)' in text
            assert 'FSDP' in text


@pytest.mark.parametrize('kind', ['SSN', 'SyncSSN'])
def test_sync_buffers_hook(kind, found):
    """The mean of every buffer, of integers too: flags, choices and radius stay what they were."""
    befores, afters = (
        [process['buffers', kind][when] for process in found] for when in ('before', 'after')
    )
    assert {int(befores[0][f'{i}.1.mean_fixed']) for i in (0, 1)} == {0, 1}
    for name, value in afters[0].items():
        assert torch.equal(value, afters[1][name]), name
        if 'running' in name:
            mean = sum(before[name] for before in befores) / WORLD
            torch.testing.assert_close(value, mean)
        else:
            assert torch.equal(value, befores[0][name]), name
    assert all(len(process['goes on', kind]) == STEPS for process in found)
    assert all(map(math.isfinite, found[0]['goes on', kind]))


def test_a_layer_that_communicates_compiles_into_one_graph(found):
    for process in found:
        for ours, theirs in zip(*process['eager, compiled'], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    running = [process['eager, compiled'][1][-1] for process in found]
    assert torch.equal(*running)
