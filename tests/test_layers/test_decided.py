"""Decided and half-decided layers: only what the choice needs, and still exactly the formulas."""

import copy
import itertools
import pickle

import pytest
import torch
from random_state import randomize_affine_and_running
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssn_plugin import SSN, set_radius
from ssn_plugin.layers.radius import copy_selection
from ssn_plugin.ops import reference
from ssn_plugin.ops.switchable_norm import aten, ratios

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
CHANNELS, GROUPS = 6, 3
# Small; of one position; and large enough for the operators that serve large inputs.
SHAPES = [
    (4, CHANNELS, 5, 7),
    (3, CHANNELS, 1, 1),
    (4, CHANNELS),
    (2, CHANNELS, 96, 67),
    (1, CHANNELS, 96, 67),
]
FORMATS = [torch.contiguous_format, torch.channels_last]


def layer_on(mean: str, var: str | None, correction: int = 0, **settings) -> SSN:
    """A float64 layer frozen on those; with None for the variance that one is undecided."""
    layer = SSN(
        CHANNELS,
        eps=1e-3,
        normalizers=NORMALIZERS,
        num_groups=GROUPS,
        correction=correction,
        **settings,
    ).double()
    with torch.no_grad():
        layer.mean_weight[NORMALIZERS.index(mean)] = 2  # one-hot by sparsemax
        if var is None:
            layer.var_weight.copy_(torch.tensor([0.02, 0.05, 0.01, -0.03]))
        else:
            layer.var_weight[NORMALIZERS.index(var)] = 2
        randomize_affine_and_running(layer)
    set_radius(layer, 0.3)
    assert (layer.mean_fixed.item(), layer.var_fixed.item()) == (1, int(var is not None))
    return layer


def image(shape, memory_format=torch.contiguous_format, dtype=torch.float64) -> torch.Tensor:
    x = torch.randn(shape, dtype=dtype) * 2 + torch.arange(CHANNELS).reshape(
        1, -1, *[1] * (len(shape) - 2)
    )
    return x.contiguous(memory_format=memory_format) if len(shape) == 4 else x


def results(layer: SSN, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    parameters = dict(layer.named_parameters())
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return dict(zip(('y', 'x', *parameters), (y.detach(), *gradients), strict=True))


def expected_results(layer: SSN, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}
    control = parameters['mean_weight'], parameters['var_weight']
    one_hot = layer.mean_ratios, layer.var_ratios
    running = (None, None) if layer.training else (layer.running_mean, layer.running_var)
    y = reference.switchable_norm(
        x,
        *(
            (p if fixed else reference.sparsestmax(z, layer.radius.item())) + 0 * z
            for z, p, fixed in zip(
                control, one_hot, (layer.mean_fixed, layer.var_fixed), strict=True
            )
        ),
        parameters.get('weight'),
        parameters.get('bias'),
        NORMALIZERS,
        GROUPS,
        layer.correction,
        layer.eps,
        *running,
    )
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return dict(zip(('y', 'x', *parameters), (y.detach(), *gradients), strict=True))


def assert_close(found, expected, rtol=1e-7, atol=1e-9):
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=rtol,
            atol=atol * max(1, value.abs().max().item()),
            msg=lambda message, name=name: f'{name}: {message}',
        )


# Against the formulas


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('memory_format', FORMATS, ids=str)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('correction', [0, 1])
def test_every_pair_of_choices_equals_the_formulas(correction, training, memory_format, shape):
    for mean, var in itertools.product(NORMALIZERS, repeat=2):
        layer = layer_on(mean, var, correction).train(training)
        x, dy = image(shape, memory_format), image(shape, memory_format)
        found, expected = results(layer, x, dy), expected_results(layer, x, dy)
        assert_close(found, expected)
        # Zero rather than None, or DistributedDataParallel would wait for them.
        assert found['mean_weight'].tolist() == found['var_weight'].tolist() == [0] * 4
        if len(shape) == 4:
            for name in ('y', 'x'):
                assert found[name].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('little', [False, True], ids=['kept', 'little kept'])
@pytest.mark.parametrize('mean', NORMALIZERS)
def test_half_decided_equals_the_formulas(mean, little, correction, training, monkeypatch):
    if little:
        monkeypatch.setattr(aten, '_SMALL', 0)
    for shape, memory_format in itertools.product(SHAPES, FORMATS):
        # An undecided layer with 'IN' refuses (N, C) in training.
        layer = layer_on(mean, None, correction).train(training and len(shape) > 2)
        x, dy = image(shape, memory_format), image(shape, memory_format)
        found, expected = results(layer, x, dy), expected_results(layer, x, dy)
        assert_close(found, expected, rtol=1e-6, atol=1e-7)  # the radius is a float32 buffer
        assert found['mean_weight'].tolist() == [0] * 4
        if len(shape) == 4 and shape[2] > 1:
            assert found['var_weight'].abs().max() > 0


@pytest.mark.parametrize('little', [False, True], ids=['kept', 'little kept'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('memory_format', FORMATS, ids=str)
@pytest.mark.parametrize('affine', [True, False])
def test_every_pair_in_other_precisions(affine, memory_format, dtype, little, monkeypatch):
    # Statistics in float32 whatever x is in; the only other rounding is that of x, y and dx.
    if little:
        monkeypatch.setattr(aten, '_SMALL', 0)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for mean, var in itertools.product(NORMALIZERS, repeat=2):
        for correction, training in ((0, True), (1, True), (0, False)):
            exact = layer_on(mean, var, correction, affine=affine).train(training)
            x, dy = (image(SHAPES[0], memory_format).to(dtype) for _ in range(2))
            expected = expected_results(exact, x.double(), dy.double())
            for layer in (copy.deepcopy(exact).float(), copy.deepcopy(exact).to(dtype)):
                if layer.mean_weight.dtype != torch.float32:
                    exact_too = copy.deepcopy(layer).double()
                    exact_too.eps = exact.eps
                    expected = expected_results(exact_too, x.double(), dy.double())
                found = results(layer, x, dy)
                assert found['y'].dtype == found['x'].dtype == dtype
                for name, value in expected.items():
                    error = (found[name].double() - value).norm()
                    assert error <= tolerance * (value.norm() + 1e-3 * dy.double().norm()), name


@pytest.mark.parametrize('training', [True, False])
def test_without_running_statistics(training):
    for mean, var in itertools.product(NORMALIZERS, repeat=2):
        layer = layer_on(mean, var, track_running_stats=False).train(training)
        x, dy = image(SHAPES[0]), image(SHAPES[0])
        found = results(layer, x, dy)
        assert_close(found, expected_results(layer.train(), x, dy))


@pytest.mark.parametrize('wanted', ['x', 'weight', 'bias', 'mean_weight'])
def test_one_gradient_alone(wanted):
    for mean, var in itertools.product(NORMALIZERS, repeat=2):
        layer = layer_on(mean, var)
        x, dy = image(SHAPES[0]), image(SHAPES[0])
        expected = results(layer, x, dy)[wanted]
        layer.requires_grad_(False)
        tensor = x if wanted == 'x' else layer.get_parameter(wanted)
        tensor.requires_grad_()
        (found,) = torch.autograd.grad(layer(x), tensor, dy)
        torch.testing.assert_close(found, expected)


def torch_layer(layer: SSN) -> nn.Module:
    only = layer.selected[0]
    if only == 'BN':
        theirs = nn.BatchNorm2d(CHANNELS, layer.eps)
    else:
        groups = {'IN': CHANNELS, 'LN': 1, 'GN': GROUPS}[only]
        theirs = nn.GroupNorm(groups, CHANNELS, layer.eps)
    theirs.load_state_dict(layer.state_dict(), strict=False)
    return theirs


@pytest.mark.parametrize('only', NORMALIZERS)
@pytest.mark.parametrize('memory_format', FORMATS, ids=str)
@pytest.mark.parametrize('mean', [0.0, 1e3])
def test_large_mean_in_a_decided_layer(mean, memory_format, only):
    layer = layer_on(only, only)
    x = (torch.randn(2, CHANNELS, 80, 80) + mean).contiguous(memory_format=memory_format)
    dy = torch.randn_like(x)
    expected = expected_results(layer, x.double(), dy.double())
    found = results(layer.float(), x, dy)
    theirs = results(torch_layer(layer), x, dy)
    for name in ('y', 'x', 'weight', 'bias'):
        error, their_error = (
            (values[name].double() - expected[name]).norm() / expected[name].norm()
            for values in (found, theirs)
        )
        bound = 4 * torch.finfo(torch.float32).eps * max(mean, 16)
        # Where their operator serves it may do what it does. Their group norm takes
        # E[x^2] - E[x]^2 on channels_last, which is garbage here: that must not serve.
        if only == 'BN' or memory_format == torch.contiguous_format:
            bound = max(bound, 1.01 * their_error)
        assert error <= bound, name


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('memory_format', FORMATS, ids=str)
def test_in_place_activation_may_follow(memory_format, training):
    for shape, mean, var in itertools.product(SHAPES, NORMALIZERS, (*NORMALIZERS, None)):
        layer = layer_on(mean, var).train(training and (var is not None or len(shape) > 2))
        x = image(shape, memory_format).requires_grad_()
        layer(x).relu_().backward(torch.randn(shape, dtype=x.dtype))
        assert x.grad.isfinite().all()


# What is computed


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.__name__.split('.')[0], [getattr(a, 'shape', None) for a in args]))
        return func(*args, **(kwargs or {}))


def operators(monkeypatch, layer: SSN, x: torch.Tensor) -> list:
    """Names and shapes of what runs, on the routes of a host that may look."""
    monkeypatch.setattr(ratios, '_get_current_dispatch_mode', lambda: None)
    with torch.no_grad(), Operators() as record:
        layer(x)
    return record.calls


@pytest.mark.parametrize('only', NORMALIZERS)
@pytest.mark.parametrize('training', [True, False])
def test_one_choice_is_one_pass_of_atens_own(only, training, monkeypatch):
    layer = layer_on(only, only).train(training)
    x = image((2, CHANNELS, 96, 67))
    full = [name for name, shapes in operators(monkeypatch, layer, x) if x.shape in shapes]
    assert full == ['native_batch_norm' if only == 'BN' else 'native_group_norm']


def test_evaluation_of_running_mean_with_another_variance_takes_no_batch_statistics(monkeypatch):
    layer = layer_on('BN', 'LN').eval()
    names = [name for name, _ in operators(monkeypatch, layer, image((2, CHANNELS, 96, 67)))]
    # One pass for the row moments, one in place; sums over a (2, 6) tensor, for LN alone.
    assert names.count('native_group_norm') == names.count('native_batch_norm') == 1
    assert names.count('sum') == 2


def test_a_mean_alone_needs_no_variance_of_rows(monkeypatch):
    layer = layer_on('LN', 'BN').eval()
    names = [name for name, _ in operators(monkeypatch, layer, image((2, CHANNELS, 96, 67)))]
    assert 'native_group_norm' not in names


# Running statistics


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize(('mean', 'var'), list(itertools.product(NORMALIZERS, repeat=2)))
def test_running_statistics_rest_once_others_are_frozen(mean, var, momentum):
    layer = layer_on(mean, var, momentum=momentum)
    layer.reset_running_stats()
    expected = nn.BatchNorm2d(CHANNELS, momentum=momentum).double()
    for _ in range(3):
        x = image(SHAPES[0])
        layer(x), expected(x)
    if 'BN' in (mean, var):
        torch.testing.assert_close(layer.running_mean, expected.running_mean)
        torch.testing.assert_close(layer.running_var, expected.running_var)
    else:
        assert layer.running_mean.tolist() == [0] * CHANNELS
        assert layer.running_var.tolist() == [1] * CHANNELS
    assert layer.num_batches_tracked == 3
    # The keys of a file are the same.
    assert set(layer.state_dict()) == set(SSN(CHANNELS).state_dict())


def test_running_statistics_go_on_while_one_is_undecided_or_one_hot_but_not_frozen():
    half, one_hot = layer_on('LN', None), SSN(CHANNELS, radius=1.0).double()
    with torch.no_grad():
        one_hot.mean_weight[1] = one_hot.var_weight[1] = 1
    assert one_hot.selected == ('LN', 'LN')
    for layer in (half, one_hot):
        layer.reset_running_stats()
        expected = nn.BatchNorm2d(CHANNELS).double()
        x = image(SHAPES[0])
        layer(x), expected(x)
        torch.testing.assert_close(layer.running_mean, expected.running_mean)
        torch.testing.assert_close(layer.running_var, expected.running_var)


# What the host knows without looking


@pytest.fixture
def elsewhere(monkeypatch):
    """As on a device whose values the host may not read."""
    monkeypatch.setattr(ratios, 'readable', lambda *tensors: False)
    monkeypatch.setattr(aten, 'readable', lambda *tensors: False)


def undecided() -> SSN:
    layer = layer_on('LN', None)
    layer.reset_parameters()
    return layer


KNOWN = {
    'undecided': (undecided, (None, None)),
    'decided': (lambda: layer_on('LN', 'GN'), (1, 3)),
    'mean alone': (lambda: layer_on('LN', None), (1, None)),
    'reset': (lambda: reset(layer_on('LN', 'GN')), (None, None)),
    'deep copy': (lambda: copy.deepcopy(layer_on('LN', 'GN')), (1, 3)),
    'pickle': (lambda: pickle.loads(pickle.dumps(layer_on('LN', 'GN'))), (1, 3)),
    'other precision': (lambda: layer_on('LN', 'GN').float(), (1, 3)),
    'loaded': (lambda: loaded(layer_on('LN', 'GN'), undecided()), (1, 3)),
    'loaded by assignment': (lambda: loaded(layer_on('LN', 'GN'), undecided(), True), (1, 3)),
    'loaded an undecided one': (lambda: loaded(undecided(), layer_on('LN', 'GN')), (None, None)),
    'loaded another': (lambda: loaded(layer_on('IN', 'BN'), layer_on('LN', 'GN')), (0, 2)),
    'copied selection': (lambda: copied(layer_on('LN', 'GN'), undecided()), (1, 3)),
    'copied half of one': (lambda: copied(layer_on('IN', None), layer_on('LN', 'GN')), (0, None)),
    'without gradient': (lambda: layer_on('LN', 'GN').requires_grad_(False), (1, 3)),
}  # fmt: skip


def reset(layer: SSN) -> SSN:
    layer.reset_parameters()
    return layer


def loaded(source: SSN, target: SSN, assign: bool = False) -> SSN:
    target.load_state_dict(source.state_dict(), assign=assign)
    return target


def copied(source: SSN, target: SSN) -> SSN:
    copy_selection(source, target)
    return target


@pytest.mark.parametrize(('make', 'known'), KNOWN.values(), ids=KNOWN)
def test_what_is_decided_is_known(make, known, elsewhere):
    layer = make()
    assert layer.known_choices() == known
    names = [None if k is None else NORMALIZERS[k] for k in known]
    fixed = [bool(flag) for flag in (layer.mean_fixed, layer.var_fixed)]
    assert fixed == [k is not None for k in known]
    selected = [name for name, is_fixed in zip(layer.selected, fixed, strict=True) if is_fixed]
    assert selected == [name for name in names if name is not None]


WRITES = {
    'another choice': lambda layer: layer.mean_choice.fill_(0),
    'not fixed any more': lambda layer: layer.var_fixed.zero_(),
    'another tensor': lambda layer: setattr(layer, 'mean_fixed', torch.tensor(0)),
    'buffers copied': lambda layer: [
        mine.copy_(other)
        for mine, other in zip(layer.buffers(), layer_on('IN', None).buffers(), strict=True)
    ],
}


@pytest.mark.parametrize('write', WRITES.values(), ids=WRITES)
def test_who_writes_to_the_flags_is_noticed(write, elsewhere):
    layer = layer_on('LN', 'GN')
    write(layer)
    assert layer.known_choices() is None
    x = image(SHAPES[0])
    y = layer(x)
    p, q = layer.mean_ratios, layer.var_ratios
    expected = reference.switchable_norm(
        x, p, q, layer.weight, layer.bias, NORMALIZERS, GROUPS, eps=layer.eps
    )
    torch.testing.assert_close(y, expected)
    set_radius(layer, 0.3)  # knows again what is frozen now
    fixed = [bool(flag) for flag in (layer.mean_fixed, layer.var_fixed)]
    assert [k is not None for k in layer.known_choices()] == fixed
    torch.testing.assert_close(layer(x), expected)


def test_setting_the_radius_twice_changes_nothing_that_is_known():
    layer = layer_on('LN', 'GN')
    before = layer.mean_fixed._version, layer.mean_choice._version
    for radius in (0.0, 0.5, 1.0):
        set_radius(layer, radius)
        assert layer.known_choices() == (1, 3)
    assert (layer.mean_fixed._version, layer.mean_choice._version) == before


@pytest.mark.parametrize('var', ['GN', 'LN', None])
@pytest.mark.parametrize('training', [True, False])
def test_elsewhere_gives_the_same(training, var, monkeypatch):
    layer = layer_on('LN', var).train(training)
    again = copy.deepcopy(layer)
    x, dy = image(SHAPES[0]), image(SHAPES[0])
    expected = results(layer, x, dy)
    monkeypatch.setattr(ratios, 'readable', lambda *tensors: False)
    monkeypatch.setattr(aten, 'readable', lambda *tensors: False)
    assert_close(results(again, x, dy), expected, rtol=1e-6, atol=1e-7)
    assert_close(dict(again.named_buffers()), dict(layer.named_buffers()))


@pytest.mark.parametrize('var', ['LN', 'GN', None])
def test_a_write_between_forward_and_backward_does_no_harm(var):
    """As an average of models or a second optimizer may make one; nobody reads what was written."""
    layer = layer_on('LN', var)
    again = copy.deepcopy(layer)
    x, dy = image(SHAPES[0]), image(SHAPES[0])
    expected = results(layer, x, dy)
    x = x.clone().requires_grad_()
    y = again(x)
    with torch.no_grad():
        again.mean_weight.add_(1)
        if var is not None:
            again.var_weight.mul_(3)
    y.backward(dy)
    found = {name: parameter.grad for name, parameter in again.named_parameters()}
    found |= {'x': x.grad, 'y': y.detach()}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
