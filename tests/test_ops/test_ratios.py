"""Importance ratios: as numbers the same as on tensors, and never where values cannot be read."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssn_plugin.ops.switchable_norm.ratios import (
    UNKNOWN,
    Control,
    Selection,
    control_gradient,
    ratio_tensors,
    read_ratios,
    readable,
)

DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def selection_of(radius=0.3, fixed=(0, 0), choice=(UNKNOWN, UNKNOWN)):
    flags = [torch.tensor(value) for value in (*fixed, *choice)]
    return Selection(torch.tensor(radius), *flags)


def read(mean, var, ratio_map, selection=None, known=(None, None)):
    return read_ratios(Control(mean, var, ratio_map, selection, known), len(mean))


def controls(size: int = 3, dtype=torch.float64, scale: float = 0.1) -> list[torch.Tensor]:
    drawn = torch.randn(2, size, dtype=torch.float64) * scale
    return [vector.to(dtype).requires_grad_() for vector in drawn]


def compare(mean, var, selection, tolerance):
    """Ratios and gradients as numbers against those on tensors under autograd."""
    ratio_map = 'softmax' if selection is None else 'sparsestmax'
    expected = ratio_tensors(Control(mean, var, ratio_map, selection))
    upstream = [torch.randn_like(values) for values in expected]
    gradients = torch.autograd.grad(expected, (mean, var), upstream)
    found = read(mean, var, ratio_map, selection)
    for ratios, control, values, grad, gradient in zip(
        found, (mean, var), expected, upstream, gradients, strict=True
    ):
        mine = torch.tensor(ratios.values, dtype=values.dtype)
        torch.testing.assert_close(mine, values.detach(), rtol=0, atol=tolerance)
        assert ratios.on_simplex
        for k in set(range(len(values))) - set(ratios.active):
            assert ratios.values[k] == 0
            assert gradient[k] == 0
        dp = {k: grad[k].item() for k in ratios.moving}
        factory = dict(dtype=control.dtype, device=control.device)
        mine = control_gradient(ratios, dp, len(values), factory)
        assert mine.dtype == control.dtype
        atol = tolerance * (1 + gradient.abs().max().item())
        torch.testing.assert_close(mine, gradient, rtol=0, atol=atol)
    return found


@pytest.mark.parametrize('radius', [0.0, 0.2, 0.45, 0.65, 1.0])
@pytest.mark.parametrize('size', [2, 3, 4])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_sparsestmax(dtype, size, radius):
    for scale in (1e-3, 0.1, 1.0):
        mean, var = controls(size, dtype, scale)
        compare(mean, var, selection_of(radius), DTYPES[dtype])


@pytest.mark.parametrize('size', [2, 3, 4])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_softmax(dtype, size):
    for scale in (1e-3, 1.0, 30.0):
        mean, var = controls(size, dtype, scale)
        compare(mean, var, None, DTYPES[dtype])


def test_softmax_of_values_at_the_edge():
    for values in (
        [0.0, -math.inf, 1.0],
        [math.nan, 0.0, 1.0],
        [math.inf, 0.0, 1.0],
        [800.0, 0, 1],
    ):
        mean, var = (torch.tensor(values).requires_grad_() for _ in range(2))
        expected = ratio_tensors(Control(mean, var, 'softmax'))
        found = read(mean, var, 'softmax', None)
        for ratios, other in zip(found, expected, strict=True):
            mine = torch.tensor(ratios.values)
            torch.testing.assert_close(mine, other.detach(), equal_nan=True, rtol=0, atol=1e-7)


@pytest.mark.parametrize('choice', [0, 1, 2, UNKNOWN])
@pytest.mark.parametrize('fixed', [(1, 0), (0, 1), (1, 1)])
def test_decided(fixed, choice):
    mean, var = controls()
    found = compare(mean, var, selection_of(0.3, fixed, (choice, choice)), 1e-12)
    for ratios, is_fixed, control in zip(found, fixed, (mean, var), strict=True):
        assert ratios.decided == bool(is_fixed)
        if is_fixed:
            k = control.argmax().item() if choice == UNKNOWN else choice
            assert ratios.active == [k]
            assert ratios.moving == []


def test_decided_without_a_choice_takes_the_last_of_the_largest():
    z = torch.tensor([0.5, 0.5, 0.1])
    mean, _ = read(z, z, 'sparsestmax', selection_of(fixed=(1, 1)))
    assert mean.values == [0, 1, 0]


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_nan_goes_through(bad):
    mean, var = torch.tensor([0.1, bad, 0.2], requires_grad=True), controls(dtype=torch.float32)[1]
    found = read(mean, var, 'sparsestmax', selection_of())
    assert all(map(math.isnan, found[0].values))
    assert not any(map(math.isnan, found[1].values))
    assert found[0].active == [0, 1, 2]


def test_what_needs_no_gradient_leaves_out_more():
    # On a face two ratios are zero or fixed; without gradient the one that is zero is not needed.
    z = torch.tensor([0.6, 0.4, -0.3])
    for learns in (False, True):
        control = z.clone().requires_grad_(learns)
        mean, _ = read(control, control, 'sparsestmax', selection_of(0.0))
        assert mean.active == [0, 1]
        assert bool(mean.moving) == learns
        with torch.no_grad():
            assert not read(control, control, 'sparsestmax', selection_of(0.0))[0].moving


def test_given_ratios():
    p = torch.tensor([0.5, 0.0, 0.7])
    mean, var = read(p, p.clone().requires_grad_(), 'given', None)
    assert mean.values == pytest.approx([0.5, 0, 0.7])
    assert (mean.active, mean.moving) == ([0, 2], [])
    assert (var.active, var.moving) == ([0, 1, 2], [0, 1, 2])
    assert not mean.on_simplex
    assert var.pull_back([1.0, 2.0, 3.0]) == [1, 2, 3]


# Where values cannot be read


def test_readable():
    assert readable(torch.ones(1), nn.Parameter(torch.ones(1)))
    assert not readable(torch.ones(1), torch.ones(1, device='meta'))

    class Subclass(torch.Tensor):
        pass

    assert not readable(torch.ones(1).as_subclass(Subclass))
    with FlopCounterMode(display=False):  # somebody records what is done
        assert not readable(torch.ones(1))
    with FakeTensorMode():
        assert not readable(torch.ones(1))


def test_not_while_tracing():
    seen = []

    def function(x):
        seen.append(readable(x))
        return x + 1

    torch.jit.trace(function, torch.ones(1), check_trace=False)
    torch.compile(function, backend='eager')(torch.ones(1))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize('known', [(None, None), (1, None), (None, 2), (0, 2)])
def test_known_choices_spare_reading(known):
    mean, var = (control.to('meta') for control in controls())
    selection = Selection(*(t.to('meta') for t in selection_of()))
    found = read(mean, var, 'sparsestmax', selection, known)
    for ratios, choice in zip(found, known, strict=True):
        if choice is None:
            assert ratios is None
        else:
            assert ratios.values == torch.eye(3)[choice].tolist()
            assert ratios.decided
    assert read(mean, var, 'softmax', None) == [None, None]
