"""Candidates for which a layer has too few values: left out, for good, and nothing else is."""

import copy

import few_values_ranks
import pytest
import torch
from processes import run_processes
from torch import nn

from ssn_plugin import SSN, radius_at, set_radius
from ssn_plugin.layers.few_values import FewValues


def pooling(size: int = 1, **arguments) -> nn.Sequential:
    layer = SSN(6, num_groups=2, **arguments)
    return nn.Sequential(nn.AdaptiveAvgPool2d(size), layer)


def after_one_pass(model: nn.Module, *inputs: torch.Tensor, least: int = 16) -> dict:
    few = FewValues(model, least)
    for x in inputs:
        model(x)
    return few.leave_out()


@pytest.mark.parametrize(
    ('candidates', 'images', 'size', 'expected'),
    [
        (('LN', 'GN', 'BN'), 1, 1, ['BN']),
        (('LN', 'GN', 'BN'), 15, 1, ['BN']),
        (('LN', 'GN', 'BN'), 16, 1, None),
        (('LN', 'GN', 'BN'), 4, 2, None),
        (('IN', 'LN', 'GN', 'BN'), 3, 2, ['IN', 'BN']),
        (('IN', 'LN', 'BN'), 4, 2, ['IN']),
        (('IN', 'LN', 'BN'), 4, 4, None),
        (('IN', 'BN'), 4, 2, ['IN']),
        (('IN', 'BN'), 3, 2, None),  # none would be left
        (('LN', 'GN'), 1, 1, None),
    ],
)
def test_which_candidates_are_left_out(candidates, images, size, expected):
    model = pooling(size, normalizers=candidates)
    left_out = after_one_pass(model, torch.randn(images, 6, 8, 8))
    assert left_out == ({} if expected is None else {'1': expected})
    for ratios in (model[1].mean_ratios, model[1].var_ratios):
        gone = [k for k, name in enumerate(candidates) if name in (expected or ())]
        rest = len(candidates) - len(gone)
        assert ratios[gone].eq(0).all()
        kept = [ratio for k, ratio in enumerate(ratios.tolist()) if k not in gone]
        assert kept == pytest.approx([1 / rest] * rest)


@pytest.mark.parametrize(
    ('optimizer', 'arguments'),
    [
        (torch.optim.SGD, dict(lr=1.0, momentum=0.9)),
        (torch.optim.Adam, dict(lr=0.05, weight_decay=0.1)),
        (torch.optim.AdamW, dict(lr=0.05, weight_decay=1.0)),
    ],
)
def test_what_is_left_out_stays_out_until_the_layer_is_decided(optimizer, arguments):
    """The momentum of the pass in which it took part, and a weight decay, pull it back."""
    torch.manual_seed(0)
    model = pooling(normalizers=('BN', 'LN', 'GN'))
    optimizer = optimizer(model.parameters(), **arguments)
    few = FewValues(model, 16)
    (model(torch.randn(2, 6, 5, 5)) * torch.randn(2, 6, 1, 1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert few.leave_out() == {'1': ['BN']}
    for step in range(60):
        set_radius(model, radius_at(step / 59))
        (model(torch.randn(2, 6, 5, 5)) * torch.randn(2, 6, 1, 1)).sum().backward()
        assert model[1].mean_weight.grad[0] == model[1].var_weight.grad[0] == 0
        optimizer.step()
        optimizer.zero_grad()
        assert model[1].mean_ratios[0] == model[1].var_ratios[0] == 0
        if step == 20:  # as a run that is killed and resumed
            other = pooling(normalizers=('BN', 'LN', 'GN'))
            other.load_state_dict(copy.deepcopy(model.state_dict()))
            assert other[1].mean_ratios.tolist() == model[1].mean_ratios.tolist()
            assert after_one_pass(other, torch.randn(2, 6, 5, 5)) == {}
    assert None not in model[1].selected
    assert 'BN' not in model[1].selected


def test_one_value_of_one_image_cannot_spoil_the_output():
    """A variance of BN of one value is 0: the layer would multiply by 1/sqrt(eps) = 316."""
    x = torch.randn(1, 6, 5, 5)
    spoilt, model = (pooling(normalizers=('LN', 'GN', 'BN')) for _ in range(2))
    spoilt[1].select('LN', 'BN')
    assert spoilt(x).abs().max() > 20
    after_one_pass(model, x)
    set_radius(model, 1.0)
    assert model(x).abs().max() < 3


def test_a_layer_of_several_levels_has_its_largest_count():
    layer = layer_with_few_values()
    assert after_one_pass(layer, torch.randn(1, 6, 4, 4), torch.randn(1, 6, 1, 1)) == {}
    assert after_one_pass(layer, torch.randn(1, 6, 2, 2), torch.randn(1, 6, 1, 1)) == {'': ['BN']}


def layer_with_few_values() -> SSN:
    return SSN(6, normalizers=('LN', 'GN', 'BN'), num_groups=2)


@pytest.mark.parametrize(
    ('before', 'x', 'after'),
    [
        (lambda layer: layer.eval(), torch.randn(2, 6, 1, 1), lambda layer: layer.train()),
        (lambda layer: None, torch.randn(0, 6, 1, 1), lambda layer: None),
        (
            lambda layer: layer.requires_grad_(False),
            torch.randn(2, 6, 1, 1),
            lambda layer: layer.requires_grad_(True),
        ),
    ],
    ids=['not reached', 'empty batch', 'frozen'],
)
def test_what_trains_later_is_looked_at_later(before, x, after):
    model = nn.ModuleDict(dict(early=layer_with_few_values(), late=layer_with_few_values()))
    before(model['late'])
    few = FewValues(model, 16)
    for _ in range(2):
        model['early'](torch.randn(2, 6, 1, 1))
        model['late'](x)
        assert few.leave_out() in ({'early': ['BN']}, {})
    assert list(few.layers) == ['late']
    after(model['late'])
    assert few.unreached() == ['late']
    model['late'](torch.randn(2, 6, 1, 1))
    assert few.leave_out() == {'late': ['BN']}
    assert few.unreached() == []
    assert model['late'].values_seen is None


def test_what_is_decided_meanwhile_keeps_its_choice():
    layer = layer_with_few_values()
    few = FewValues(layer, 16)
    set_radius(layer, 1.0)
    layer(torch.randn(2, 6, 1, 1))
    assert few.leave_out() == {}
    assert layer.selected == ('BN', 'BN')
    layer = layer_with_few_values()
    few = FewValues(layer, 16)
    layer.select(mean='BN')
    layer(torch.randn(2, 6, 1, 1))
    assert few.leave_out() == {'': ['BN']}
    set_radius(layer, 1.0)
    assert layer.selected == ('BN', 'GN')


def test_a_compiled_graph_is_not_compiled_anew():
    """A layer in it is not looked at; that it might be must not cost a second compilation."""
    x = torch.randn(2, 6, 5, 5)
    counts = []
    for watched in (False, True):
        torch._dynamo.reset()
        graphs = []
        model = pooling(normalizers=('LN', 'GN', 'BN'))
        model[1].values_seen = (0, 0) if watched else None

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph

        compiled = torch.compile(model, backend=backend)
        compiled(x)
        model[1].values_seen = None
        compiled(x)
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0


def begun(layer: SSN) -> None:
    layer.var_weight.data[1] = 1e-6


@pytest.mark.parametrize(
    'change',
    [
        begun,
        lambda layer: layer.select('LN'),
        lambda layer: layer.select('BN', 'BN'),
        lambda layer: layer.requires_grad_(False),
        lambda layer: layer.eval(),
        lambda layer: layer.to('meta'),
    ],
    ids=['begun', 'mean decided', 'decided', 'frozen', 'evaluation', 'meta'],
)
def test_what_has_nothing_to_choose_is_left_alone(change):
    layer = layer_with_few_values()
    change(layer)
    before = copy.deepcopy(layer)
    few = FewValues(layer, 16)
    layer(torch.randn(1, 6, 1, 1, device=layer.weight.device))
    assert few.leave_out() == {}
    assert (layer.values_seen is None) == (not few.layers)
    if not layer.weight.is_meta:
        assert torch.equal(layer.mean_weight, before.mean_weight)
        assert torch.equal(layer.var_weight, before.var_weight)


def test_an_empty_batch_and_a_vector():
    layer = layer_with_few_values()
    assert after_one_pass(layer, torch.randn(0, 6, 3, 3)) == {}
    assert after_one_pass(layer, torch.randn(8, 6)) == {'': ['BN']}


def test_all_processes_leave_out_the_same(tmp_path):
    found = run_processes(few_values_ranks.left_out, 2, tmp_path)
    first = {'small': ['BN'], 'called_in_one': ['BN']}
    later = {'called_later_in_one': ['BN'], 'frozen_at_first': ['BN']}
    assert found == [[first, later, ['never_called']]] * 2
