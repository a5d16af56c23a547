"""BatchNorm in memory becomes SSN: the same network, with everything that belongs to its layers."""

import copy
import io
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.utils import parametrize, prune

from ssn_plugin import (
    SSN,
    SSN1d,
    SSN2d,
    SSN3d,
    SyncSSN,
    collapse_ssn,
    convert_batch_norm,
    set_radius,
)
from ssn_plugin.layers.plain_norms import BatchNorm


def trained(layer):
    """Statistics and affine parameters of a layer that has seen something."""
    with torch.no_grad():
        for name, low, high in (
            ('weight', 0.5, 1.5), ('bias', -1, 1), ('running_mean', -1, 1), ('running_var', 0.3, 2)
        ):  # fmt: skip
            value = getattr(layer, name)
            if value is not None:
                value.uniform_(low, high)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(7)
    return layer


class Block(nn.Module):
    """Convolutions that share one norm, nested, with a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = trained(nn.BatchNorm2d(channels))
        self.also = nn.ModuleDict({'the same': self.norm})
        self.last = nn.Sequential(nn.Conv2d(channels, channels, 1), trained(BatchNorm(channels)))

    def forward(self, x):
        return x + self.last(self.norm(self.conv2(self.norm(self.conv1(x)).relu())))


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        trained(nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)),
        nn.ReLU(),
        Block(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        trained(nn.BatchNorm1d(8)),
        nn.Linear(8, 5),
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('grad', [False, True])
def test_at_ratio_one_every_output_is_the_same_bit_for_bit(dtype, grad):
    model = network().to(dtype).eval()
    x = torch.randn(4, 3, 20, 24, dtype=dtype)
    with torch.set_grad_enabled(grad):
        expected = model(x)
        found = convert_batch_norm(copy.deepcopy(model), 1)(x)
        assert torch.equal(found, expected)
        nearly = convert_batch_norm(model, 0.9)(x)
    assert 0 < (nearly - expected).abs().max() < 0.5 * expected.abs().max()


@pytest.mark.parametrize(
    ('made_by', 'kind'),
    [
        (nn.BatchNorm1d, SSN1d),
        (nn.BatchNorm2d, SSN2d),
        (nn.BatchNorm3d, SSN3d),
        (nn.SyncBatchNorm, SyncSSN),
        (BatchNorm, SSN),
        (type('Renamed', (nn.BatchNorm2d,), {}), SSN2d),
    ],
)
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('tracked', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_everything_of_a_layer_stays(made_by, kind, affine, tracked, dtype):
    layer = made_by(8, 1e-3, None, affine, tracked).to(dtype).eval()
    trained(layer)
    made = convert_batch_norm(layer, 0.7)
    assert type(made) is kind
    assert (made.num_features, made.eps, made.momentum) == (8, 1e-3, None)
    assert (made.affine, made.track_running_stats, made.training) == (affine, tracked, False)
    for key in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
        assert getattr(made, key) is getattr(layer, key)
    if affine or tracked:
        assert made.mean_weight.dtype == dtype
    assert made.mean_weight.requires_grad
    others = len(made.normalizers) - 1
    expected = [0.3 / others] * others + [0.7]
    assert made.mean_ratios.tolist() == pytest.approx(expected, abs=5e-3)
    assert (int(made.mean_fixed), int(made.var_fixed), float(made.radius)) == (0, 0, 0)
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)  # nothing in it that a file cannot hold


def test_root_nested_and_shared():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = {id(p) for group in optimizer.param_groups for p in group['params']}
    model.train()
    model[1].eval()  # as norm_eval has it
    # Without IN, which is nothing but a constant where a row has one number.
    converted = convert_batch_norm(model, normalizers=('LN', 'BN'))
    assert converted is model
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    block = model[3]
    assert block.norm is block.also['the same']
    assert (model[1].training, block.norm.training) == (False, True)
    assert (model[1].eps, model[1].momentum) == (1e-3, 0.03)
    new = {n for n, p in model.named_parameters() if id(p) not in held}
    assert new == {n for n, _ in model.named_parameters() if n.endswith('_weight')}
    model(torch.randn(4, 3, 20, 24)).sum().backward()
    assert block.norm.mean_weight.grad.abs().max() > 0
    set_radius(model, 1.0)
    assert block.norm.selected == ('BN', 'BN')


def test_a_frozen_layer_is_exact_and_decided():
    model = network().eval()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    alone, x = copy.deepcopy(model[1]), torch.randn(2, 8, 9, 9)
    convert_batch_norm(model, 0.9)
    assert torch.equal(model[1](x), alone(x))
    assert (int(model[1].mean_fixed), int(model[1].var_fixed)) == (1, 1)
    assert not any(parameter.requires_grad for parameter in model[1].parameters())
    assert int(model[3].norm.mean_fixed) == 0
    set_radius(model, 0.3)
    assert model[1].selected == ('BN', 'BN')


@pytest.mark.parametrize('normalizers', [('BN', 'IN'), ('GN', 'BN', 'IN', 'LN')])
def test_other_candidates(normalizers):
    layer = convert_batch_norm(trained(nn.BatchNorm2d(8)), 0.6, normalizers, num_groups=2)
    rest = 0.4 / (len(normalizers) - 1)
    expected = [0.6 if name == 'BN' else rest for name in normalizers]
    assert layer.normalizers == normalizers
    assert layer.var_ratios.tolist() == pytest.approx(expected)


class WithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the norm, then drop and act, in one forward pass."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class InHalf(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x / 2)


def test_layers_with_a_forward_pass_of_their_own():
    model = nn.Sequential(trained(WithActivation(8)), trained(InHalf(8)), nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 8, 5, 5)
    expected = model(x)
    with pytest.warns(UserWarning, match=r'left 1 layers as they are.*\(InHalf\): 1$'):
        convert_batch_norm(model, 1)
    assert [type(m) for m in model] == [nn.Sequential, InHalf, SSN2d]
    assert torch.equal(model(x), expected)
    assert not any(module.training for module in model.modules())


class HoldsInLists(nn.Module):
    """A norm that is a module and held besides, by which the forward pass goes."""

    def __init__(self, hold):
        super().__init__()
        self.norm = trained(nn.BatchNorm2d(8))
        object.__setattr__(self, 'held', hold(self.norm))  # as nn.Module itself would not

    def forward(self, x):
        held = self.held
        while not isinstance(held, nn.Module):
            held = held['a' if isinstance(held, dict) else 0]
        return held(x)


class Named(NamedTuple):
    norm: nn.Module


def within_itself(norm):
    held = [norm]
    held.append(held)
    return held


@pytest.mark.parametrize(
    'hold',
    [
        lambda n: n, lambda n: [n], lambda n: (n, 1), lambda n: dict(a=n),
        Named, lambda n: [[(n, 1)]], lambda n: dict(a=[dict(a=n)]), within_itself,
    ],
    ids=['attribute', 'list', 'tuple', 'dict', 'named', 'nested', 'nested dict', 'within itself'],
)  # fmt: skip
def test_where_else_a_module_holds_a_layer(hold, recwarn):
    model, x = HoldsInLists(hold).eval(), torch.randn(2, 8, 5, 5)
    expected = model(x)
    convert_batch_norm(model, 1)
    seen = []
    model.norm.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model(x), expected)
    assert seen == [1]
    model.norm.select('BN', 'BN')
    collapse_ssn(model)
    assert type(model.norm) is nn.BatchNorm2d
    model.norm.register_forward_hook(lambda *_: seen.append(2))
    assert torch.equal(model(x), expected)
    assert seen == [1, 2]
    assert not recwarn.list


def test_what_is_no_module_of_the_model_is_left_and_said():
    norm = nn.Sequential(trained(nn.BatchNorm2d(8)))
    model = nn.Sequential(nn.BatchNorm2d(8), HoldsInLists(lambda _: [norm, [norm]]))
    del model[1].norm
    with pytest.warns(UserWarning, match=r'in 1.held, which .*in a ModuleList'):
        convert_batch_norm(model)
    assert isinstance(model[0], SSN)
    assert type(norm[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    'held', [immutable_list([1, [2]]), immutable_dict(a=1)], ids=['list', 'dict']
)
def test_what_may_not_be_written_to_and_holds_no_layer(held):
    model = nn.Sequential(nn.BatchNorm2d(8))
    model.held = held
    assert isinstance(convert_batch_norm(model)[0], SSN)
    assert model.held is held


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    'compute',
    [
        lambda norm: parametrize.register_parametrization(norm, 'weight', Doubled()),
        lambda norm: prune.l1_unstructured(norm, 'weight', 0.5),
    ],
    ids=['parametrized', 'pruned'],
)
def test_a_layer_whose_weight_is_computed_stays(compute):
    model = network().eval()
    compute(model[1])
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    with pytest.warns(UserWarning, match=r'left 1 layers.*: 1$'):
        convert_batch_norm(model, 1)
    assert not isinstance(model[1], SSN)
    assert isinstance(model[6], SSN)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('layer', [nn.BatchNorm2d(8), WithActivation(8)])
def test_hooks_stay(layer):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer)
    seen = []
    layer.register_forward_pre_hook(lambda module, x: seen.append('before'))
    after = layer.register_forward_hook(
        lambda module, x, kwargs, y: seen.append(module), with_kwargs=True
    )
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append('backward'))
    convert_batch_norm(model)
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    assert seen == ['before', model[1], 'backward']
    after.remove()
    seen.clear()
    model(torch.randn(2, 3, 9, 9))
    assert seen == ['before']


@pytest.mark.parametrize('wrap', [nn.DataParallel, lambda m: torch.compile(m, backend='eager')])
def test_inside_a_wrapper(wrap):
    """Whose parts are replaced where they are, after a pass too."""
    model, x = network().eval(), torch.randn(2, 3, 20, 24)
    expected = model(x)
    wrapped = wrap(model)
    wrapped(x)
    assert convert_batch_norm(wrapped, 1) is wrapped
    assert isinstance(model[1], SSN2d)
    torch.testing.assert_close(wrapped(x), expected)
    assert torch.equal(model(x), expected)


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d: constants, no parameters."""

    def __init__(self, channels):
        super().__init__()
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            self.register_buffer(name, torch.ones(channels))


@pytest.mark.parametrize(
    ('model', 'arguments', 'said'),
    [
        (nn.BatchNorm2d(8), dict(bn_ratio=1.5), 'bn_ratio: got 1.5'),
        (nn.BatchNorm2d(8), dict(normalizers=('IN', 'LN')), "expected 'BN' among them"),
        (nn.Conv2d(1, 1, 1), {}, 'got no BatchNorm to convert, expected'),
        (nn.Sequential(Frozen(8)), {}, r'got no BatchNorm to convert \(it has Frozen\)'),
        (nn.Sequential(nn.BatchNorm2d(8), nn.LazyBatchNorm2d()), {}, 'the lazy 1'),
    ],
)
def test_what_cannot_be_converted_is_said_and_nothing_changed(model, arguments, said):
    before = list(model.modules())
    with pytest.raises(ValueError, match=said):
        convert_batch_norm(model, **arguments)
    assert list(model.modules()) == before


def test_a_second_time_there_is_nothing_left():
    model = convert_batch_norm(network())
    with pytest.raises(ValueError, match='no BatchNorm'):
        convert_batch_norm(model)


def test_a_batch_norm_of_vectors_goes_without_in():
    """Of (N, C) the variance of IN is that of one number."""
    model = convert_batch_norm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    assert model[1].normalizers == ('LN', 'BN')
    model(torch.randn(5, 4)).square().mean().backward()
    assert convert_batch_norm(nn.BatchNorm2d(8)).normalizers == ('IN', 'LN', 'BN')
