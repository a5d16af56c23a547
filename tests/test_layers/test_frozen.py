"""Decided stays decided: momentum, weight decay, averaging of models, copies, resuming."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from since import since
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssn_plugin import SSN, set_radius

SHAPE = (4, 6, 5, 5)
FUSED = since(2, 4, 'fused optimizers of the CPU')
OPTIMIZERS = {
    'SGD': (torch.optim.SGD, dict(lr=0.5, momentum=0.9, weight_decay=0.1)),
    'SGD Nesterov': (torch.optim.SGD, dict(lr=0.5, momentum=0.9, weight_decay=0.1, nesterov=True)),
    'SGD one by one': (
        torch.optim.SGD,
        dict(lr=0.5, momentum=0.9, weight_decay=0.1, foreach=False),
    ),
    'SGD fused': pytest.param(
        torch.optim.SGD,
        dict(lr=0.5, momentum=0.9, weight_decay=0.1, fused=True),
        marks=FUSED,
    ),
    'Adam': (torch.optim.Adam, dict(lr=0.1, weight_decay=0.1)),
    'AdamW': (torch.optim.AdamW, dict(lr=0.1, weight_decay=0.5)),
    'AdamW fused': pytest.param(
        torch.optim.AdamW, dict(lr=0.1, weight_decay=0.5, fused=True), marks=FUSED
    ),
    'RMSprop': (torch.optim.RMSprop, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
}


def layer_on(first: str, second: str, radius: float) -> SSN:
    layer = SSN(6)
    with torch.no_grad():
        layer.mean_weight[layer.normalizers.index(first)] = 0.01
        layer.var_weight[layer.normalizers.index(second)] = 0.01
    set_radius(layer, radius)
    return layer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(torch.randn(SHAPE)) * torch.randn(SHAPE)).sum().backward()
    optimizer.step()


def control(layer: SSN) -> list[list[float]]:
    """Control parameters as a file holds them."""
    state = layer.state_dict()
    return [state['mean_weight'].tolist(), state['var_weight'].tolist()]


IN, LN, BN = torch.eye(3).tolist()


# Optimizers


@pytest.mark.parametrize(('kind', 'settings'), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_leaves_frozen_control_parameters_bit_identical(kind, settings):
    layer = layer_on('IN', 'LN', radius=0.3)
    optimizer = kind(layer.parameters(), **settings)
    for _ in range(4):
        step(layer, optimizer)  # fills momentum
    moving = control(layer)
    step(layer, optimizer)
    assert all(before != after for before, after in zip(moving, control(layer), strict=True))

    set_radius(layer, 1.0)
    frozen, weight = control(layer), layer.weight.detach().clone()
    assert all(sorted(vector) == [0, 0, 1] for vector in frozen)
    for _ in range(4):
        step(layer, optimizer)
        assert control(layer) == frozen
    assert (layer.weight - weight).abs().min() > 0


@pytest.mark.parametrize('name', ['mean', 'var'])
def test_the_other_statistic_goes_on_learning(name):
    layer = SSN(6)
    other = {'mean': 'var', 'var': 'mean'}[name]
    with torch.no_grad():
        getattr(layer, f'{name}_weight')[1] = 2  # one-hot by sparsemax
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    step(layer, optimizer)
    set_radius(layer, 0.1)
    before = getattr(layer, f'{other}_weight').detach().clone()
    for _ in range(3):
        step(layer, optimizer)
    assert layer.state_dict()[f'{name}_weight'].tolist() == LN
    assert getattr(layer, f'{name}_ratios').tolist() == LN
    assert (getattr(layer, f'{other}_weight') - before).abs().max() > 1e-3


def test_several_models_and_optimizers_in_one_process():
    models = [layer_on('IN', 'LN', 1.0), layer_on('LN', 'BN', 0.3)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1) for m in models]
    before = control(models[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    assert control(models[0]) == [IN, LN]
    assert all(old != new for old, new in zip(before, control(models[1]), strict=True))


def test_frozen_half_precision_layer():
    layer = layer_on('IN', 'LN', 1.0).bfloat16()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert control(layer) == [IN, LN]


def test_ratios_hold_whatever_is_written_to_the_control_parameters():
    layer = layer_on('IN', 'LN', 1.0)
    x = torch.randn(SHAPE)
    expected = layer(x)
    with torch.no_grad():
        layer.mean_weight.normal_()
        layer.var_weight.normal_()
    assert layer.selected == ('IN', 'LN')
    assert torch.equal(layer(x), expected)


def test_freezing_does_not_keep_a_layer_alive():
    layer = layer_on('IN', 'LN', 1.0)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
    other = layer_on('LN', 'BN', 1.0)
    step(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert control(other) == [LN, BN]


# Averaging of models


@pytest.mark.parametrize('from_start', [True, False], ids=['from the start', 'from the middle'])
@pytest.mark.parametrize('rule', [None, get_ema_multi_avg_fn(0.99)], ids=['mean', 'EMA'])
def test_averaged_model_is_one_hot_when_the_model_is(rule, from_start):
    model = nn.Sequential(layer_on('LN', 'LN', 0.3))
    averaged = AveragedModel(model, multi_avg_fn=rule)
    if from_start:
        averaged.update_parameters(model)
    with torch.no_grad():  # the model has come to lean to another candidate than the average
        model[0].mean_weight.copy_(torch.tensor([0.02, 0.01, 0]))
    set_radius(model, 1.0)
    x = torch.randn(SHAPE)
    for _ in range(3):
        averaged.update_parameters(model)
        layer = averaged.module[0]
        assert layer.selected == model[0].selected == ('IN', 'LN')
        assert [layer.mean_ratios.tolist(), layer.var_ratios.tolist()] == [IN, LN]
        torch.testing.assert_close(averaged(x), model(x))
        # A file of the average pairs its flags with one-hot vectors.
        state = averaged.state_dict()
        assert state['module.0.mean_fixed'] == 1
        assert state['module.0.mean_weight'].tolist() == IN
    fresh = nn.Sequential(SSN(6))
    fresh.load_state_dict(averaged.module.state_dict())
    assert fresh[0].selected == ('IN', 'LN')


@pytest.mark.parametrize('rule', [None, get_ema_multi_avg_fn(0.9)], ids=['mean', 'EMA'])
def test_averaged_buffers_leave_ratios_on_the_simplex(rule):
    # Then radius and flags are averaged as well, and the average freezes later than the model.
    model = nn.Sequential(layer_on('LN', 'LN', 0.3))
    averaged = AveragedModel(model, multi_avg_fn=rule, use_buffers=True)
    averaged.update_parameters(model)
    set_radius(model, 1.0)
    for _ in range(5):
        averaged.update_parameters(model)
        layer = averaged.module[0]
        for ratios in (layer.mean_ratios, layer.var_ratios):
            assert ratios.min() >= 0
            assert ratios.sum().item() == pytest.approx(1, abs=1e-6)


# Copies


COPIES = {
    'deepcopy': copy.deepcopy,
    'pickle': lambda layer: pickle.loads(pickle.dumps(layer)),
    'deepcopy of a model': lambda layer: copy.deepcopy(nn.Sequential(layer))[0],
}


@pytest.mark.parametrize('duplicate', COPIES.values(), ids=COPIES)
def test_copies_are_frozen_as_the_original_and_independent_of_it(duplicate):
    layer = SSN(6)
    with torch.no_grad():
        layer.mean_weight[0] = 2
    set_radius(layer, 0.3)
    twin = duplicate(layer)
    assert twin.selected == ('IN', None)
    assert twin.mean_fixed == 1
    assert twin.var_fixed == 0
    state, own = layer.state_dict(), twin.state_dict()
    torch.testing.assert_close(dict(own), dict(state), rtol=0, atol=0)
    assert not {t.data_ptr() for t in own.values()} & {t.data_ptr() for t in state.values()}

    untouched = copy.deepcopy(state)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    before = twin.var_weight.tolist()
    for _ in range(2):
        step(twin, optimizer)
    assert twin.mean_ratios.tolist() == IN
    assert twin.var_weight.tolist() != before
    set_radius(twin, 1.0)
    torch.testing.assert_close(dict(layer.state_dict()), dict(untouched), rtol=0, atol=0)


# Resuming


class Training:
    """A run of 20 iterations, each with its own data, that freezes at three points."""

    def __init__(self):
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Conv2d(3, 6, 1),
            SSN(6),
            nn.ReLU(),
            nn.Conv2d(6, 2, 1),
            SSN(2, normalizers=('IN', 'BN')),
        )
        # Its mean is one-hot from the start, the other layer from 0.71 on, its variance from 0.82.
        with torch.no_grad():
            self.model[1].mean_weight[1] = 1.5
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-2
        )

    def run(self, begin: int, end: int) -> None:
        for iteration in range(begin, end):
            set_radius(self.model, iteration / 19)
            generator = torch.Generator().manual_seed(iteration)
            x = torch.randn(4, 3, 5, 5, generator=generator)
            target = torch.randn(4, 2, 5, 5, generator=generator)
            self.optimizer.zero_grad()
            (self.model(x) - target).square().mean().backward()
            self.optimizer.step()

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save(dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict()), file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        checkpoint = torch.load(file, weights_only=True)
        self.model.load_state_dict(checkpoint['model'])
        self.optimizer.load_state_dict(checkpoint['optimizer'])


@pytest.mark.parametrize('interruption', [1, 10, 15, 17])
def test_resumed_run_ends_where_the_uninterrupted_one_ends(interruption):
    whole, first, second = Training(), Training(), Training()
    whole.run(0, 20)
    first.run(0, interruption)
    second.load(first.save())
    second.run(interruption, 20)
    torch.testing.assert_close(
        dict(second.model.state_dict()), dict(whole.model.state_dict()), rtol=0, atol=0
    )
    for layer in (whole.model[1], whole.model[4]):
        assert None not in layer.selected
        assert all(sorted(vector)[-2:] == [0, 1] for vector in control(layer))


def test_run_passes_through_partly_frozen_states():
    # What makes the resumptions above worth testing.
    training = Training()
    first, second = training.model[1], training.model[4]
    for begin, end, frozen in ((0, 10, [1, 0, 0]), (10, 15, [1, 0, 1]), (15, 17, [1, 1, 1])):
        training.run(begin, end)
        assert [first.mean_fixed, first.var_fixed, second.var_fixed] == frozen


def test_resumed_frozen_layer_is_held_without_another_set_radius():
    layer = layer_on('IN', 'LN', 1.0)
    fresh = SSN(6)
    fresh.load_state_dict(layer.state_dict())
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        step(fresh, optimizer)
    assert control(fresh) == [IN, LN]


def test_loading_an_undecided_state_lets_go():
    layer = layer_on('IN', 'LN', 1.0)
    layer.load_state_dict(SSN(6).state_dict())
    assert layer.selected == (None, None)
    before = control(layer)
    step(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    assert all(old != new for old, new in zip(before, control(layer), strict=True))


def test_layers_made_in_inference_mode_are_frozen_too():
    x = torch.randn(SHAPE)
    with torch.inference_mode():
        layer = layer_on('LN', 'IN', 1.0).eval()
        assert layer.selected == ('LN', 'IN')
        y = layer(x)
        layer.mean_choice.fill_(layer.normalizers.index('IN'))  # nobody counts this write
        expected = layer_on('IN', 'IN', 1.0).eval()(x)
        assert torch.allclose(layer(x), expected)
        assert not torch.allclose(y, expected)
