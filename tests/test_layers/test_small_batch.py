"""The warning about one sample at a time: once, with the ways out, and only where it is true."""

import warnings

import pytest
import torch
from since import ONE_GRAPH
from torch import nn

from ssn_plugin import SN, SSN, SyncSSN, set_radius
from ssn_plugin.layers import switchable


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(switchable, '_warned', False)


def told(layer: nn.Module, num: int = 1) -> list[str]:
    """Warnings of three training passes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(3):
            layer(torch.randn(num, 4, 3, 3))
    return [str(warning.message) for warning in caught]


def chosen(name: str) -> SSN:
    layer = SSN(4)
    with torch.no_grad():
        for control in (layer.mean_weight, layer.var_weight):
            control[layer.normalizers.index(name)] = 1
    set_radius(layer, 1.0)
    return layer


@pytest.mark.parametrize('kind', [SSN, SN, SyncSSN])
def test_once_with_the_ways_out(kind):
    (text,) = told(nn.Sequential(kind(4), kind(4)))
    assert text.startswith(f'{kind.__name__} got a batch of one sample in training.')
    assert "normalizers=('LN', 'GN', 'BN')" in text
    assert 'SyncSSN' in text
    assert not told(kind(4))


@pytest.mark.filterwarnings('ignore:SSN got a batch of one sample')
def test_the_claim():
    """One image: BN's output is IN's in training and is not in evaluation."""
    x = torch.randn(1, 4, 5, 5) * 3 + 2
    batch, instance = chosen('BN'), chosen('IN')
    assert torch.allclose(batch(x), instance(x), atol=1e-5)
    assert not torch.allclose(batch.eval()(x), instance.eval()(x), atol=0.1)


@pytest.mark.parametrize(
    ('layer', 'num'),
    [
        (SSN(4), 2),
        (SSN(4).eval(), 1),
        (SSN(4, normalizers=('IN', 'LN')), 1),
        (SSN(4, normalizers=('LN', 'GN', 'BN')), 1),
        # these use the statistics of the batch in evaluation too
        (SSN(4, track_running_stats=False), 1),
        (chosen('LN'), 1),
    ],
    ids=['two samples', 'evaluation', 'no BN', 'no IN', 'untracked', 'decided against BN'],
)
def test_silence(layer, num):
    assert not told(layer, num)
    assert told(chosen('BN'))  # and nothing was used up by it


@ONE_GRAPH
def test_compiled_graphs_have_no_part_in_it():
    torch.compiler.reset()
    compiled = torch.compile(SSN(4), fullgraph=True, backend='eager')
    assert not [text for text in told(compiled) if 'one sample' in text]
