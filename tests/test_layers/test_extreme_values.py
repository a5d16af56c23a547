"""Finite input whose squares leave float32: the answer of float64, forward and backward."""

import copy

import pytest
import torch
from torch import nn

from ssn_plugin import SN, SSN, SelectedNorm, set_radius
from ssn_plugin.ops import reference

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
C, GROUPS = 8, 4
SHAPES = [(6, C), (3, C, 5), (2, C, 7, 9), (2, C, 40, 50)]


def layer_of(kind: str, **settings) -> nn.Module:
    if kind == 'SelectedNorm':
        layer = SelectedNorm(C, 'LN', 'BN', num_groups=GROUPS, **settings)
    else:
        layer = SN if kind == 'SN' else SSN
        layer = layer(C, normalizers=NORMALIZERS, num_groups=GROUPS, **settings)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
        if kind in ('SSN', 'SN'):
            layer.mean_weight.normal_(std=0.1)
            layer.var_weight.normal_(std=0.1)
        elif kind in NORMALIZERS:
            for control in (layer.mean_weight, layer.var_weight):
                control[NORMALIZERS.index(kind)] = 2
            set_radius(layer, 1.0)
    return layer


def formula(layer: nn.Module, x: torch.Tensor, ratios) -> torch.Tensor:
    vectors = [value.detach().double().requires_grad_() for value in (layer.weight, layer.bias)]
    statistics = [None, None]
    if not layer.training:
        statistics = [layer.running_mean.double(), layer.running_var.double()]
    y = reference.switchable_norm(
        x, *ratios, *vectors, NORMALIZERS, GROUPS, layer.correction, layer.eps, *statistics
    )
    return y, vectors


def ratios_of(layer: nn.Module) -> list[torch.Tensor]:
    if isinstance(layer, SelectedNorm):
        sources = (layer.mean_source, layer.var_source)
        return [torch.eye(4, dtype=torch.float64)[NORMALIZERS.index(name)] for name in sources]
    return [layer.mean_ratios.double(), layer.var_ratios.double()]


def check(layer: nn.Module, x: torch.Tensor) -> None:
    """Within float32's rounding of float64, all sizes counted in those of a normalized input."""
    tolerance = 2**-7 if x.dtype == torch.bfloat16 else 1e-5
    before = copy.deepcopy(layer)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    wide = x.double().requires_grad_()
    expected, vectors = formula(before, wide, ratios_of(before))
    expected.backward(upstream.double())
    assert y.dtype == x.dtype
    size = expected.norm()
    assert (y - expected).norm() <= tolerance * size
    # dx is what is left of terms as large as this.
    slope = wide.detach().std() ** -1
    assert (leaf.grad - wide.grad).norm() <= 4 * tolerance * slope * upstream.double().norm()
    for parameter, vector in zip((layer.weight, layer.bias), vectors, strict=True):
        error = (parameter.grad.double() - vector.grad).norm()
        assert error <= tolerance * (vector.grad.norm() + upstream.double().norm())
    for name, value in [*layer.named_buffers(), *layer.named_parameters()]:
        assert bool(value.isfinite().all()), name
        assert value.grad is None or bool(value.grad.isfinite().all()), name


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('kind', ['SSN', 'SN', 'SelectedNorm', *NORMALIZERS])
def test_answers_as_for_smaller_numbers(kind, shape, channels_last):
    for scale in (1e17, 1e19, 1e30):  # before the squares overflow, at it, far beyond it
        for correction in (0, 1):
            x = torch.randn(shape) * scale
            if len(shape) == 2 and kind == 'IN':
                continue  # nothing but the bias, whatever comes in
            if channels_last:
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            check(layer_of(kind, correction=correction), x)
            check(layer_of(kind).to(torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize('kind', ['SSN', 'BN', 'LN'])
def test_of_many_short_rows(kind):
    """Of an x like this next to nothing is kept for the backward pass."""
    check(layer_of(kind), torch.randn(700, C, 7, 7) * 1e30)


@pytest.mark.parametrize('kind', ['SSN', 'LN', 'GN'])
def test_in_evaluation(kind):
    check(layer_of(kind).eval(), torch.randn(2, C, 7, 9) * 1e30)


@pytest.mark.parametrize('momentum', [0.0, 0.1, None, 1.0])
@pytest.mark.parametrize('kind', ['SSN', 'BN', 'SelectedNorm', 'one-hot IN'])
def test_running_statistics_stay_finite_and_recover(kind, momentum):
    layer = layer_of(kind, momentum=momentum)
    if kind == 'one-hot IN':  # not frozen, so that statistics of BN are tracked beside it
        with torch.no_grad():
            layer.mean_weight[0] = layer.var_weight[0] = 2
    layer(torch.randn(4, C, 5, 5) * 1e30)
    largest = torch.finfo(torch.float32).max
    if momentum == 0.0:
        assert bool((layer.running_var == 1).all())
        assert bool((layer.running_mean == 0).all())
    else:
        assert bool((layer.running_var > 0.09 * largest).all())
    x = torch.randn(4, C, 5, 5)
    layer(x)
    assert bool(layer.running_var.isfinite().all())
    if momentum == 1.0:
        torch.testing.assert_close(layer.running_var, x.var((0, 2, 3)), rtol=1e-5, atol=0)


def test_what_is_not_finite_stays_so():
    for value in (float('nan'), float('inf')):
        for kind in ('SSN', *NORMALIZERS):
            x = torch.randn(2, C, 5, 5)
            x[0, 0, 0, 0] = value
            layer = layer_of(kind)
            assert not bool(layer(x)[0, 0, 0, 0].isfinite())
