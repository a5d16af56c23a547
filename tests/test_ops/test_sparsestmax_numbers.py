"""SparsestMax in Python floats: the same numbers as on tensors, projection and Jacobian."""

import itertools
import math

import pytest
import torch

from ssn_plugin.ops.sparsestmax import SparsestMaxFunction, circumradius, project_floats

SIZES = (2, 3, 4, 5)
DOUBLE = torch.finfo(torch.float64).eps
SINGLE = torch.finfo(torch.float32).eps


def on_tensors(z: list[float], radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The ratios and the Jacobian, in float64."""
    size = len(z)
    rows = torch.tensor([z] * size, dtype=torch.float64, requires_grad=True)
    p = SparsestMaxFunction.apply(rows, torch.tensor(radius, dtype=torch.float64))
    (jacobian,) = torch.autograd.grad(p, rows, torch.eye(size, dtype=torch.float64))
    return p[0].detach(), jacobian


def on_floats(z: list[float], radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    found = project_floats(z, radius, DOUBLE)
    rows = [found.pull_back(row) for row in torch.eye(len(z)).tolist()]
    return tuple(torch.tensor(value, dtype=torch.float64) for value in (found.ratios, rows))


def assert_agrees(z: list[float], radius: float) -> None:
    (p, jacobian), (expected_p, expected_jacobian) = on_floats(z, radius), on_tensors(z, radius)
    message = f'z={z}, radius={radius}'
    torch.testing.assert_close(p, expected_p, rtol=0, atol=1e-13, msg=message)
    scale = 1 + expected_jacobian.abs().max().item()
    torch.testing.assert_close(jacobian, expected_jacobian, rtol=0, atol=1e-9 * scale, msg=message)


@pytest.mark.parametrize('exponent', range(-9, 3))
@pytest.mark.parametrize('size', SIZES)
def test_random_vectors_of_every_scale(size, exponent):
    for _ in range(40):
        z = (torch.randn(size, dtype=torch.float64) * 10.0**exponent).tolist()
        assert_agrees(z, torch.empty(()).uniform_(-0.1, 1.0).item())


@pytest.mark.parametrize('offset', [0.0, 1e3, -1e6])
def test_a_common_offset_changes_nothing(offset):
    for _ in range(40):
        z = [float(offset + k / 1024) for k in torch.randint(-512, 512, (3,)).tolist()]
        radius = torch.empty(()).uniform_(0, 0.8).item()
        assert_agrees(z, radius)
        assert project_floats(z, radius, DOUBLE) == project_floats(
            [value - offset for value in z], radius, DOUBLE
        )


@pytest.mark.parametrize('size', SIZES)
def test_every_pattern_of_ties(size):
    radii = (0.0, 1e-6, 0.2, 0.45, 0.6, 0.75, circumradius(size) - 1e-4, circumradius(size), 1.0)
    for pattern in itertools.product((0.0, 0.01, -0.4), repeat=size):
        for radius in radii:
            assert_agrees(list(pattern), radius)


@pytest.mark.parametrize('gap', [1e-3, 1e-7, 1e-12, 1e-30, 1e-300])
@pytest.mark.parametrize('size', SIZES)
def test_near_ties(size, gap):
    for radius in (0.0, 1e-7, 0.1, 0.3, 0.6, circumradius(size) - 1e-7):
        for k in range(size):
            z = [0.0] * size
            z[k] = gap
            assert_agrees(z, radius)
        assert_agrees([k * gap for k in range(size)], radius)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('precision', [SINGLE, DOUBLE])
def test_from_the_circumradius_on_exactly_one_hot(size, precision):
    limit = circumradius(size)
    for radius in (limit, torch.tensor(limit).item(), 1.0, math.inf):
        for _ in range(20):
            z = (torch.randn(size, dtype=torch.float64) * 1e-3).tolist()
            found = project_floats(z, radius, precision)
            assert sorted(found.ratios) == [0.0] * (size - 1) + [1.0]
            assert found.ratios[z.index(max(z))] == 1
            assert found.moving == []
            assert found.pull_back([math.nan] * size) == [0.0] * size


@pytest.mark.parametrize('size', SIZES)
def test_what_rounds_to_one_is_one_hot(size):
    # In the precision of the control parameters, as a flag is set by that one being 1.
    for shortfall in (0, 1e-9, 2.0**-26, 2.0**-25, 2.0**-24, 1e-6):
        z = [0.0] + [-1.0 + shortfall] * (size - 1)
        found = project_floats(z, 0.0, SINGLE)
        rounded = torch.tensor(on_tensors(z, 0.0)[0].tolist(), dtype=torch.float32)
        one_hot = rounded.max() == 1
        assert (1.0 in found.ratios) == one_hot
        if one_hot:
            assert sorted(found.ratios) == [0.0] * (size - 1) + [1.0]
        else:
            assert torch.equal(torch.tensor(found.ratios), rounded)


def test_ratios_that_do_not_move():
    # Two on a binding circle, a vertex; three on a circle move, and so do two off it.
    assert project_floats([0.6, 0.4, -0.3], 0.5, DOUBLE).moving == []
    assert project_floats([3.0, 1.0, 0.0], 0.0, DOUBLE).moving == []
    assert sorted(project_floats([0.1, 0.0, -0.1], 0.3, DOUBLE).moving) == [0, 1, 2]
    assert sorted(project_floats([0.6, 0.4, -0.3], 0.0, DOUBLE).moving) == [0, 1]


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('place', range(3))
@pytest.mark.parametrize('radius', [0.0, 0.4, 1.0])
def test_nan_and_inf_make_nan(radius, place, bad):
    z = [0.1, 0.2, 0.3]
    z[place] = bad
    found = project_floats(z, radius, SINGLE)
    assert all(map(math.isnan, found.ratios))
    assert all(map(math.isnan, found.pull_back([1.0, 2.0, 3.0])))


def test_a_radius_of_nan_makes_nan():
    assert all(map(math.isnan, project_floats([0.1, 0.2], math.nan, SINGLE).ratios))


def test_largest_finite_entries_do_not_overflow():
    largest = torch.finfo(torch.float64).max
    for radius in (0.0, 0.5, 1.0):
        assert project_floats([largest, -largest, 0.0], radius, DOUBLE).ratios == [1, 0, 0]
        found = project_floats([largest, largest, -largest], radius, DOUBLE)
        assert found.ratios[2] == 0
        assert sum(found.ratios) == pytest.approx(1)
