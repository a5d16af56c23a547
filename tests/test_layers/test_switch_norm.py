"""SN: softmax ratios over the same statistics."""

import copy

import pytest
import torch
from torch import nn

from ssn_plugin import SN, SSN, set_radius
from ssn_plugin.ops import reference

SHAPE = (4, 6, 5, 7)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize(
    'normalizers', [('IN', 'LN', 'BN'), ('IN', 'LN'), ('IN', 'LN', 'BN', 'GN')]
)
def test_layer_equals_the_formulas(normalizers, correction, training):
    layer = SN(6, normalizers=normalizers, num_groups=3, correction=correction).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        if layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    layer.train(training)
    running = (None, None) if training else (layer.running_mean, layer.running_var)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    inputs = (x, *layer.parameters())
    expected = reference.switchable_norm(
        x,
        layer.mean_weight.softmax(0),
        layer.var_weight.softmax(0),
        layer.weight,
        layer.bias,
        normalizers,
        3,
        correction,
        layer.eps,
        *running,
    )
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, upstream), expected_gradients)


def test_ratios_are_the_softmax():
    layer = SN(6)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([1.0, 2.0, 3.0]).log())
    assert layer.mean_ratios.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert layer.var_ratios.tolist() == pytest.approx([1 / 3] * 3)
    assert not layer.mean_ratios.requires_grad
    assert layer.selected == (None, None)


def test_without_bn_there_are_no_running_statistics():
    layer = SN(6, normalizers=('IN', 'LN'))
    assert set(layer.state_dict()) == {'weight', 'bias', 'mean_weight', 'var_weight'}
    x = torch.randn(SHAPE)
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_radius_leaves_it_alone():
    model = nn.Sequential(SN(6), SSN(6))
    before = copy.deepcopy(model[0].state_dict())
    set_radius(model, 1.0)
    assert model[1].selected == ('BN', 'BN')
    assert model[0].selected == (None, None)
    torch.testing.assert_close(dict(model[0].state_dict()), dict(before))


@pytest.mark.parametrize('momentum', [0.1, None])
def test_running_statistics_are_those_of_batch_norm(momentum):
    layer, expected = SN(6, momentum=momentum), nn.BatchNorm2d(6, momentum=momentum)
    for step in range(4):
        x = torch.randn(SHAPE) * (step + 1) + step
        layer(x), expected(x)
    for name, value in expected.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), value)


@pytest.mark.parametrize('training', [True, False])
def test_empty_batch(training):
    layer = SN(6).train(training)
    x = torch.randn(0, 6, 7, 7, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())


@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('shape', [(3, 6, 1, 1), (1, 6, 1, 1), (1, 6)])
def test_spatial_size_of_one_is_never_nan(shape, correction):
    layer = SN(6, correction=correction)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn(shape))
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


def test_released_shapes_load_without_conversion():
    # Of the SN repositories, with BN and (using_bn=False) without.
    released = {
        'weight': torch.randn(1, 6, 1, 1),
        'bias': torch.randn(1, 6, 1, 1),
        'mean_weight': torch.randn(3),
        'var_weight': torch.randn(3),
        'running_mean': torch.randn(1, 6, 1),
        'running_var': torch.rand(1, 6, 1),
    }
    layer = SN(6)
    layer.load_state_dict(released, strict=True)
    for name, value in released.items():
        assert torch.equal(layer.state_dict()[name], value.flatten())

    without = {name: value for name, value in released.items() if 'running' not in name}
    without |= {'mean_weight': torch.randn(2), 'var_weight': torch.randn(2)}
    layer = SN(6, normalizers=('IN', 'LN'))
    layer.load_state_dict(without, strict=True)
    assert torch.equal(layer.mean_ratios, without['mean_weight'].softmax(0))
