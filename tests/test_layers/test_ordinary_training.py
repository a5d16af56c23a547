"""What ordinary training code does around a layer, and BatchNorm takes without a word."""

import copy
import io
import threading
import time

import pytest
import torch
from since import since
from torch import nn
from torch.nn.utils import parametrize, prune

from ssn_plugin import SN, SSN, SelectedNorm, SyncSSN, set_radius, sparsestmax, undecided_layers
from ssn_plugin.errors import CheckpointError

SHAPE = (2, 3, 9, 9)


def network(decided: bool = True, channels: int = 3) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(channels, 6, 3), SSN(6), nn.ReLU(), nn.Conv2d(6, channels, 3))
    if decided:
        set_radius(model, 1.0)
    return model


def state_of(model: nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.detach().clone(), tensor._version) for name, tensor in named}


# Steps


@pytest.mark.parametrize('decided', [True, False])
def test_two_networks_against_each_other(decided):
    first, second = network(decided), network(decided)
    steps = [torch.optim.RMSprop(second.parameters()), torch.optim.Adam(first.parameters())]
    for _ in range(3):
        fake = first(torch.randn(2, 3, 12, 12))
        second(fake.detach()).square().sum().backward()
        steps[0].step()
        steps[0].zero_grad()
        second(fake).square().sum().backward()
        steps[1].step()


@pytest.mark.parametrize('decided', [True, False])
def test_a_step_inside_the_backward_pass(decided):
    model = network(decided)
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], 1e-3, momentum=0.9)
        parameter.register_post_accumulate_grad_hook(
            lambda _, optimizer=optimizer: optimizer.step()
        )
    for _ in range(3):
        model(torch.randn(SHAPE)).square().sum().backward()


LOOKS = {
    'state_dict': lambda m: m.state_dict(),
    'deepcopy': copy.deepcopy,
    'save': lambda m: torch.save(m.state_dict(), io.BytesIO()),
    'save whole': lambda m: torch.save(m, io.BytesIO()),
    'repr': repr,
    'selected': lambda m: m[1].selected,
    'undecided_layers': undecided_layers,
    'ratios': lambda m: (m[1].mean_ratios, m[1].var_ratios),
    'set_radius': lambda m: set_radius(m, 0.1),
    'evaluation': lambda m: m.eval()(torch.randn(SHAPE)),
}


@pytest.mark.parametrize('look', LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize('decided', [True, False])
def test_a_look_between_forward_and_backward(look, decided):
    model = network(decided)
    y = model(torch.randn(SHAPE))
    look(model)
    y.backward(torch.randn_like(y))


def test_threads_that_train_a_model_each():
    failures = []

    def train():
        try:
            model = network(decided=False)
            optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
            for step in range(20):
                set_radius(model, step / 20)
                optimizer.zero_grad()
                model(torch.randn(SHAPE)).square().mean().backward()
                optimizer.step()
                model.state_dict()
            assert not undecided_layers(model)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_idle_layers_cost_nobody_a_step():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.SGD([parameter], 0.1)

    def seconds() -> float:
        started = time.process_time()
        for _ in range(200):
            optimizer.step()
        return time.process_time() - started

    seconds()
    before = min(seconds() for _ in range(5))
    idle = [SSN(4) for _ in range(400)]
    for layer in idle:
        set_radius(layer, 1.0)
    assert min(seconds() for _ in range(5)) < 3 * before


@pytest.mark.parametrize('make', [lambda: SSN(4), lambda: network()[1]], ids=['fresh', 'decided'])
def test_a_layer_made_in_inference_mode_and_any_optimizer(make):
    with torch.inference_mode():
        layer = make()
        set_radius(layer, 1.0)
        layer.load_state_dict(layer.state_dict())
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    torch.optim.SGD([parameter], 0.1).step()


# Saving and loading


def test_saving_changes_nothing():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(SHAPE)).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        model[1].mean_weight.normal_()  # as an average of models would
    before = state_of(model)
    state = model.state_dict()
    for name, (value, version) in state_of(model).items():
        assert torch.equal(value, before[name][0]), name
        assert version == before[name][1], name
    assert sorted(state['1.mean_weight'].tolist()) == [0, 0, 1]
    fresh = network(decided=False)
    fresh.load_state_dict(state)
    assert fresh[1].selected == model[1].selected


def test_entries_of_an_undecided_layer_are_its_tensors():
    # As in every other layer: whoever averages models writes into the state dict.
    layer = SSN(6)
    state = layer.state_dict()
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if name in state:
            assert state[name].data_ptr() == tensor.data_ptr(), name


def test_undecided_again_by_writing_the_flags():
    layer = network()[1]
    with torch.no_grad():
        for tensor in (layer.mean_fixed, layer.var_fixed, layer.mean_weight, layer.var_weight):
            tensor.zero_()
    set_radius(layer, 0.0)
    assert layer.selected == (None, None)
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    layer(torch.randn(2, 6, 5, 5)).square().sum().backward()
    optimizer.step()
    assert layer.selected == (None, None)
    assert layer.mean_weight.abs().max() > 0


@pytest.mark.parametrize('radius', [0.5, 1.0])
def test_a_flag_without_its_vector_does_not_count(radius):
    layer = SSN(8)
    set_radius(layer, 1.0)
    layer.radius.fill_(radius)
    state = {key: v for key, v in layer.state_dict().items() if not key.endswith('_weight')}
    other = SSN(8, normalizers=('IN', 'LN', 'BN', 'GN'), num_groups=4)
    other.load_state_dict(state, strict=False)
    assert other.selected == (None, None)
    assert other.radius == 0


def test_a_part_of_a_state_leaves_the_choice_alone():
    layer = network()[1]
    before = layer.selected
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([9.0, 0, 0]))
    layer.load_state_dict({'weight': torch.ones(6)}, strict=False)
    assert layer.selected == before


@pytest.mark.parametrize('kind', [SSN, SN, SyncSSN])
@pytest.mark.parametrize('strict', [True, False])
def test_candidates_in_another_order(kind, strict):
    layer, other = kind(8), kind(8, normalizers=('BN', 'IN', 'LN'))
    for source, target in ((layer, other), (other, layer)):
        with pytest.raises(CheckpointError, match='candidates') as caught:
            target.load_state_dict(source.state_dict(), strict=strict)
        assert all(str(side.normalizers) in str(caught.value) for side in (source, target))


@pytest.mark.parametrize('kind', [SSN, SN])
def test_candidates_are_in_the_file(kind, tmp_path):
    model = nn.Sequential(kind(8, normalizers=('LN', 'GN', 'BN'), num_groups=4))
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    state = torch.load(tmp_path / 'model.pth', weights_only=True)
    model.load_state_dict(state)
    with pytest.raises(CheckpointError, match='candidates'):
        nn.Sequential(kind(8)).load_state_dict(state)


def test_a_plain_dict_of_tensors_is_taken_as_the_layers_own():
    model = nn.Sequential(SSN(8, normalizers=('LN', 'GN', 'BN'), num_groups=4))
    best = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best)


@pytest.mark.parametrize('normalizers', [('BN', 'LN', 'IN'), ('LN', 'GN', 'BN')])
def test_released_shapes_are_of_in_ln_bn(normalizers):
    released = {
        'weight': torch.ones(1, 8, 1, 1),
        'bias': torch.zeros(1, 8, 1, 1),
        'mean_weight': torch.zeros(3),
        'var_weight': torch.zeros(3),
        'running_mean': torch.zeros(1, 8, 1),
        'running_var': torch.ones(1, 8, 1),
    }
    SN(8).load_state_dict(released)
    with pytest.raises(CheckpointError, match='candidates'):
        SN(8, normalizers=normalizers, num_groups=4).load_state_dict(released)


def test_assigned_from_a_file_that_counts_no_batches():
    state = SSN(8).state_dict()
    del state['num_batches_tracked']
    state._metadata.clear()
    with torch.device('meta'):
        layer = SSN(8)
    layer.load_state_dict(state, assign=True)
    assert layer(torch.randn(2, 8, 4, 4)).isfinite().all()
    assert layer.num_batches_tracked == 1


# Construction and attributes


def test_pruning_and_parametrization():
    layer = SSN(8)
    prune.l1_unstructured(layer, 'weight', amount=0.5)
    y = layer(torch.randn(2, 8, 4, 4))
    assert (y == 0).flatten(2).all(-1).sum() == 2 * 4
    y.sum().backward()

    class Positive(nn.Module):
        def forward(self, weight):
            return weight.abs() + 1

    for name in ('weight', 'bias', 'mean_weight'):
        layer = SSN(8)
        parametrize.register_parametrization(layer, name, Positive())
        layer(torch.randn(2, 8, 4, 4)).sum().backward()
        assert layer.parametrizations[name].original.grad is not None


LAYERS = {
    'SSN': lambda **k: SSN(8, **k),
    'SN': lambda **k: SN(8, **k),
    'SyncSSN': lambda **k: SyncSSN(8, **k),
    'SelectedNorm': lambda **k: SelectedNorm(8, 'BN', 'BN', **k),
    'SelectedNorm of two': lambda **k: SelectedNorm(8, 'LN', 'BN', **k),
}


@pytest.mark.parametrize('make', LAYERS.values(), ids=LAYERS)
def test_tracking_switched_off_later(make):
    layer, torchs = make(), nn.BatchNorm2d(8)
    x = torch.randn(4, 8, 5, 5) + 3
    layer(x)
    torchs(x)
    layer.track_running_stats = torchs.track_running_stats = False
    for training in (True, False):
        layer.train(training)(x * 2)
        torchs.train(training)(x * 2)
        assert layer.num_batches_tracked == torchs.num_batches_tracked == 1
        torch.testing.assert_close(layer.running_mean, torchs.running_mean)
        torch.testing.assert_close(layer.running_var, torchs.running_var)
    if 'BN' in str(getattr(layer, 'mean_source', '')):
        torch.testing.assert_close(layer(x), torchs(x))


@pytest.mark.parametrize('make', LAYERS.values(), ids=LAYERS)
def test_device_and_dtype_of_the_constructor(make):
    layer = make(device='cpu', dtype=torch.float64)
    assert layer.weight.dtype == layer.running_var.dtype == torch.float64
    assert layer(torch.randn(2, 8, 3, 3).double()).dtype == torch.float64
    layer = make(device='meta')
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    assert layer(torch.randn(2, 8, 3, 3, device='meta')).shape == (2, 8, 3, 3)


@since(2, 2, 'torch.utils.deterministic')
@pytest.mark.parametrize('make', LAYERS.values(), ids=LAYERS)
def test_from_the_meta_device_to_values(make, monkeypatch):
    with torch.device('meta'):
        layer = make()
    monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', True)
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    try:
        layer.to_empty(device='cpu')
        layer.reset_parameters()
    finally:
        torch.use_deterministic_algorithms(False)
    assert layer(torch.randn(2, 8, 4, 4)).isfinite().all()
    fresh = make()
    for (name, value), other in zip(layer.named_buffers(), fresh.buffers(), strict=True):
        if not name.startswith(('running', 'num')):
            assert torch.equal(value, other), name


def test_radius_of_a_model_without_values():
    with pytest.raises(ValueError, match=r'model: got .* meta device, expected .*to_empty'):
        set_radius(SSN(8, device='meta'), 0.5)


def test_fresh_running_statistics_of_a_selected_norm():
    layer = SelectedNorm(8, 'LN', 'BN')
    layer(torch.randn(4, 8, 3, 3) + 2)
    layer.reset_running_stats()
    assert not layer.running_mean.any()
    assert (layer.running_var == 1).all()
    assert layer.num_batches_tracked == 0


# Second derivatives


def penalty(norm: nn.Module, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Gradients of a gradient penalty, of an output that enters the loss linearly."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 8, 3).double()
    z = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, 8, 4, 4, dtype=torch.float64)
    (g,) = torch.autograd.grad((norm(conv(z)) * c).sum(), z, create_graph=True)
    g.square().sum().backward()
    return conv.weight.grad, norm.weight.grad


@pytest.mark.parametrize(
    ('name', 'of_torch'),
    [
        ('BN', nn.BatchNorm2d(8)),
        ('LN', nn.GroupNorm(1, 8)),
        ('GN', nn.GroupNorm(4, 8)),
        ('IN', nn.GroupNorm(8, 8)),
    ],
)
def test_gradient_penalty_of_a_decided_layer(name, of_torch):
    layer = SSN(8, normalizers=('IN', 'LN', 'BN', 'GN'), num_groups=4, dtype=torch.float64)
    layer.select(name, name)
    expected = penalty(of_torch.double())
    for mine, theirs in zip(penalty(layer), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert layer.mean_weight.grad is None or not layer.mean_weight.grad.any()


@pytest.mark.parametrize('kind', [SSN, SN])
def test_gradient_penalty_reaches_the_control_parameters(kind):
    """Against a difference quotient, through which no graph goes."""
    layer = kind(8, dtype=torch.float64)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.02, -0.03, 0.05]))
        layer.var_weight.copy_(torch.tensor([-0.04, 0.01, 0.02]))
    set_radius(layer, 0.3)

    def value(model: nn.Module) -> float:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 8, 3).double()
        z = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
        c = torch.randn(4, 8, 4, 4, dtype=torch.float64)
        (g,) = torch.autograd.grad((model(conv(z)) * c).sum(), z)
        return g.square().sum().item()

    penalty(layer)
    for name in ('mean_weight', 'var_weight'):
        for k in range(3):
            values = []
            for step in (1e-5, -1e-5):
                moved = copy.deepcopy(layer)
                getattr(moved, name).data[k] += step
                values.append(value(moved))
            slope = (values[0] - values[1]) / 2e-5
            assert getattr(layer, name).grad[k].item() == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_second_derivative_by_the_control_parameters_is_refused():
    layer = SSN(8)
    y = layer(torch.randn(2, 8, 4, 4))
    gradients = torch.autograd.grad(
        (y * torch.randn_like(y)).sum(), [layer.mean_weight], create_graph=True
    )
    with pytest.raises(RuntimeError, match='second derivative'):
        gradients[0].square().sum().backward()
    z = torch.zeros(3, requires_grad=True)
    (dz,) = torch.autograd.grad(sparsestmax(z, 0.3)[0], z, create_graph=True)
    with pytest.raises(RuntimeError, match='second derivative'):
        dz.sum().backward()
