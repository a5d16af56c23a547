"""The pieces for a loop of one's own: radius by progress, parameter groups, clipping."""

import math

import pytest
import torch
from torch import nn

from ssn_plugin import (
    SN,
    SSN,
    clip_control_gradients,
    control_parameters,
    radius_at,
    set_radius,
    ssn_parameter_groups,
    undecided_layers,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), SSN(8), nn.Sequential(nn.Conv2d(8, 8, 3), SN(8)), nn.Conv2d(8, 2, 3)
    )


def learn(model: nn.Module, scale: float = 1.0) -> None:
    y = model(torch.randn(4, 3, 9, 9))
    (y * torch.randn_like(y)).sum().mul(scale).backward()


@pytest.mark.parametrize(
    ('progress', 'schedule', 'expected'),
    [
        (0, {}, 0.0),
        (0.25, {}, 0.25),
        (1, {}, 1.0),
        (1.5, {}, 1.0),  # a run that goes on beyond what was planned
        (0.3, dict(begin=0.4), 0.0),
        (0.7, dict(begin=0.4), 0.5),
        (0.5, dict(end=0.5), 1.0),
        (0.5, dict(start_radius=0.2, end_radius=0.6), 0.4),
        (0.5, dict(start_radius=0.6, end_radius=0.2), 0.4),
    ],
)
def test_radius_at(progress, schedule, expected):
    assert radius_at(progress, **schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [
        (dict(progress=-0.1), r'progress: got -0\.1'),
        (dict(progress=math.nan), 'progress: got nan'),
        (dict(progress='half'), "progress: got 'half'"),
        (dict(progress=0.5, begin=0.5, end=0.5), r'begin, end: got 0\.5, 0\.5'),
        (dict(progress=0.5, end=1.1), 'begin, end'),
        (dict(progress=0.5, begin='0'), 'begin, end'),
        (dict(progress=0.5, start_radius=-1), 'start_radius: got -1'),
        (dict(progress=0.5, end_radius=math.inf), r'end_radius: got .*inf'),
    ],
)
def test_radius_at_refuses(arguments, told):
    with pytest.raises(ValueError, match=told):
        radius_at(**arguments)


def test_groups_hold_every_parameter_once():
    model = network()
    groups = ssn_parameter_groups(model, 0.5, weight_decay=0.01)
    names = {parameter: name for name, parameter in model.named_parameters()}
    others, control = ([names[p] for p in group['params']] for group in groups)
    expected = ['1.mean_weight', '1.var_weight', '2.1.mean_weight', '2.1.var_weight']
    assert control == expected
    assert sorted(others + control) == sorted(names.values())
    assert [(g['lr'], g['weight_decay']) for g in groups] == [(0.5, 0.01), (0.05, 0.0)]
    assert [names[p] for p in control_parameters(model)] == expected


def test_groups_by_other_factors():
    groups = ssn_parameter_groups(network(), 0.5, 0.01, lr_mult=1, decay_mult=0.5)
    assert (groups[1]['lr'], groups[1]['weight_decay']) == (0.5, 0.005)
    # without weight_decay the optimizer's own is for the others alone
    optimizer = torch.optim.AdamW(ssn_parameter_groups(network(), 0.5), weight_decay=0.3)
    assert [group['weight_decay'] for group in optimizer.param_groups] == [0.3, 0]


def test_a_shared_layer_and_none():
    layer = SSN(8)
    model = nn.Sequential(layer, nn.Sequential(layer))
    assert len(control_parameters(model)) == 2
    (only,) = ssn_parameter_groups(nn.Conv2d(3, 8, 3), 0.1)
    assert len(only['params']) == 2
    assert clip_control_gradients(nn.Conv2d(3, 8, 3)) == 0


def test_a_scheduler_keeps_the_ratio():
    optimizer = torch.optim.SGD(ssn_parameter_groups(network(), 0.5))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    first, second = (group['lr'] for group in optimizer.param_groups)
    assert second == pytest.approx(first / 10)
    assert first < 0.5


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [
        (dict(lr=-1), 'lr: got -1'),
        (dict(lr=0.1, weight_decay=math.nan), 'weight_decay: got nan'),
        (dict(lr=0.1, lr_mult='a tenth'), 'lr_mult: got'),
        (dict(lr=0.1, decay_mult=0.5), 'decay_mult: got 0.5 without weight_decay'),
    ],
)
def test_groups_refuse(arguments, told):
    with pytest.raises(ValueError, match=told):
        ssn_parameter_groups(network(), **arguments)


@pytest.mark.parametrize('collected', [False, True])
def test_clipping_is_that_of_the_control_parameters_alone(collected):
    model = network()
    learn(model, 1e3)
    control = control_parameters(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.cat([p.grad for p in control]).norm()
    assert norm > 2
    torch.testing.assert_close(clip_control_gradients(control if collected else model, 2.0), norm)
    for name, parameter in model.named_parameters():
        factor = 2 / norm if any(parameter is p for p in control) else 1
        torch.testing.assert_close(parameter.grad, before[name] * factor, rtol=1e-5, atol=0)


def test_a_small_gradient_is_left_alone():
    model = network()
    learn(model, 1e-6)
    before = [p.grad.clone() for p in control_parameters(model)]
    assert clip_control_gradients(model) < 1
    assert all(map(torch.equal, before, (p.grad for p in control_parameters(model))))


def test_frozen_control_parameters_are_no_obstacle():
    model = network()
    model[1].requires_grad_(False)
    learn(model, 1e3)
    assert clip_control_gradients(model) > 1
    assert model[1].mean_weight.grad is None


def test_a_loop_of_ones_own_decides_every_layer():
    model = network()
    optimizer = torch.optim.SGD(ssn_parameter_groups(model, 0.05, 1e-4), momentum=0.9)
    left = []
    for step in range(20):
        set_radius(model, radius_at(step / 20, end=0.5))
        optimizer.zero_grad()
        learn(model)
        clip_control_gradients(model)
        optimizer.step()
        left.append(len(undecided_layers(model)))
    # The radius is step / 10, and one-hot from 0.8165 on: at step 9.
    assert left == [1] * 9 + [0] * 11
