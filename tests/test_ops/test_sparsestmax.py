"""SparsestMax: against brute force and an enumeration of faces, kink by kink, tie by tie."""

import itertools
import math

import pytest
import torch
from since import ONE_GRAPH
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ssn_plugin import sparsestmax
from ssn_plugin.ops import reference
from ssn_plugin.ops.sparsestmax import circumradius

SIZES = (2, 3, 4, 5)
# Relative rounding of sums of a few numbers of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def objective(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (p - z).square().sum(-1)


def simplex_grid(size: int, steps: int) -> torch.Tensor:
    """Every point of the simplex whose entries are multiples of 1 / steps."""
    bars = torch.combinations(torch.arange(steps + size - 1), size - 1)
    edges = torch.cat(
        (torch.full_like(bars[:, :1], -1), bars, torch.full_like(bars[:, :1], steps + size - 1)), 1
    )
    return (edges.diff(dim=1) - 1).double() / steps


def best_point(z: torch.Tensor, radius: float) -> tuple[torch.Tensor, tuple[int, ...], bool]:
    """Minimiser, its face, and whether the circle binds, from the candidates of every face.

    The constraints active at a minimiser are p_i = 0 outside some face and perhaps the circle. In
    the affine hull of a face the stationary points are the foot of z and, on the circle, both ends
    of the line through the face's centre and that foot. None of this is how the package does it.
    """
    size = len(z)
    candidates = []
    for count in range(1, size + 1):
        for face in itertools.combinations(range(size), count):
            index = list(face)
            centred = z[index] - z[index].mean()
            steps = [(centred, False)]
            squared = radius**2 - (1 / count - 1 / size)
            if squared >= 0 and centred.norm() > 0:
                on_circle = math.sqrt(squared) * centred / centred.norm()
                steps += [(on_circle, True), (-on_circle, True)]
            for step, binds in steps:
                p = torch.zeros(size, dtype=torch.float64)
                p[index] = 1 / count + step
                if p.min() >= -1e-13 and (p - 1 / size).norm() >= radius - 1e-13:
                    candidates.append((objective(p, z).item(), p, face, binds))
    _, p, face, binds = min(candidates, key=lambda candidate: candidate[0])
    return p, face, binds


def random_problem(size: int) -> tuple[torch.Tensor, float]:
    scale = 10 ** torch.empty(()).uniform_(-1.5, 0.3).item()
    radius = torch.empty(()).uniform_(0, circumradius(size)).item()
    return torch.randn(size, dtype=torch.float64) * scale, radius


def away_from_kinks(z: torch.Tensor, radius: float, margin: float = 1e-2) -> bool:
    """Whether no change of one entry by ``margin`` changes the face or whether the circle binds.

    So z is at least ``margin`` away, along every axis, from a change of support, from a ratio that
    reaches zero, and from the circle beginning or ceasing to bind.
    """
    regime = best_point(z, radius)[1:]
    steps = margin * torch.cat((torch.eye(len(z)), -torch.eye(len(z)))).double()
    return all(best_point(z + step, radius)[1:] == regime for step in steps)


def jacobian(z: torch.Tensor, radius: float) -> torch.Tensor:
    return torch.autograd.functional.jacobian(lambda v: sparsestmax(v, radius), z)


# The definition


@pytest.mark.parametrize(('size', 'steps'), [(3, 300), (4, 60), (5, 30)])
def test_no_point_of_a_fine_grid_is_better(size, steps):
    grid = simplex_grid(size, steps)
    distance = (grid - 1 / size).norm(dim=-1)
    for _ in range(20):
        z, radius = random_problem(size)
        p = sparsestmax(z, radius)
        assert p.min() >= 0
        assert p.sum().item() == pytest.approx(1, abs=1e-12)
        assert (p - 1 / size).norm() >= radius - 1e-12
        best = objective(grid[distance >= radius], z).min()
        assert objective(p, z) <= best + 1e-12
        # The grid is fine enough for the comparison to say something.
        assert objective(p, z) >= best - 8 / steps * (1 + z.norm())


@pytest.mark.parametrize('size', [2, 3, 4, 5, 6])
def test_is_the_best_of_the_stationary_points_of_all_faces(size):
    for _ in range(80 if size < 5 else 30):
        z, radius = random_problem(size)
        torch.testing.assert_close(
            sparsestmax(z, radius), best_point(z, radius)[0], rtol=0, atol=1e-11
        )


@pytest.mark.parametrize('size', [3, 5, 8])
def test_reference_recursion_agrees(size):
    for _ in range(60):
        z, radius = random_problem(size)
        torch.testing.assert_close(
            sparsestmax(z, radius), reference.sparsestmax(z, radius), rtol=0, atol=1e-11
        )


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_batch_stays_on_the_simplex_and_outside_the_circle(size, dtype):
    z = torch.randn(500, size, dtype=dtype) * 10 ** torch.empty(500, 1, dtype=dtype).uniform_(-5, 4)
    limit, tolerance = circumradius(size), TOLERANCE[dtype]
    for radius in (-1.0, 0.0, 0.1, 0.3, 0.5, 0.7, limit, 1.0, math.inf):
        p = sparsestmax(z, radius)
        assert p.min() >= 0
        torch.testing.assert_close(p.sum(-1), torch.ones_like(p[:, 0]), rtol=0, atol=tolerance)
        assert (p - 1 / size).norm(dim=-1).min() >= min(radius, limit) - tolerance
        # The order of the entries is kept.
        assert (p.gather(-1, z.argsort(-1)).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize('exponent', range(-5, 5))
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_scales(exponent, dtype):
    for size, radius in itertools.product(SIZES, (0.0, 0.2, 0.45, 0.65)):
        z = (torch.randn(size, dtype=torch.float64) * 10.0**exponent).to(dtype)
        expected = best_point(z.double(), radius)[0]
        torch.testing.assert_close(
            sparsestmax(z, radius).double(), expected, rtol=0, atol=TOLERANCE[dtype]
        )


def test_largest_finite_entries_do_not_overflow():
    largest = torch.finfo(torch.float32).max
    z = torch.tensor([[largest, -largest, 0.0], [largest, largest, -largest]])
    for radius in (0.0, 0.5, 1.0):
        p = sparsestmax(z, radius)
        assert p[0].tolist() == [1, 0, 0]
        assert p[1, 2] == 0
        assert p[1].sum() == 1


HAND_WORKED = {
    # Inside the triangle: z - mean(z) + 1/3.
    'sparsemax interior': ((0.5, 0.2, 0.1), 0.0, (17 / 30, 8 / 30, 5 / 30)),
    'sparsemax face': ((0.6, 0.4, -0.3), 0.0, (0.6, 0.4, 0)),
    'sparsemax vertex': ((3.0, 1.0, 0.0), 0.0, (1, 0, 0)),
    # The example in which the release's shortcut differs: 1/2 +- sqrt(r^2 - 1/6) / sqrt(2).
    'face': ((0.6, 0.4, -0.3), 0.5, (0.5 + math.sqrt(1 / 24), 0.5 - math.sqrt(1 / 24), 0)),
    # 1/3 + r * (1, 0, -1) / sqrt(2).
    'circle': (
        (0.1, 0.0, -0.1),
        0.3,
        (1 / 3 + 0.3 / math.sqrt(2), 1 / 3, 1 / 3 - 0.3 / math.sqrt(2)),
    ),
    # Already far enough from the centre: the distance of (0.6, 0.4, 0) is sqrt(14/75) = 0.432.
    'circle that does not bind': ((0.6, 0.4, -0.3), 0.43, (0.6, 0.4, 0)),
    'two candidates': ((0.1, 0.0), 0.5, (0.5 + math.sqrt(1 / 8), 0.5 - math.sqrt(1 / 8))),
    # The circle leaves the tetrahedron; face of three, of radius sqrt(0.45^2 - 1/12).
    'four candidates': (
        (-0.1, 0.3, -0.3, 0.1),
        0.45,
        (1 / 3 - math.sqrt(143 / 2400), 1 / 3 + math.sqrt(143 / 2400), 0, 1 / 3),
    ),
    'beyond the circumradius': ((0.1, 0.0, -0.1), 0.8165, (1, 0, 0)),
}


@pytest.mark.parametrize(('z', 'radius', 'expected'), HAND_WORKED.values(), ids=HAND_WORKED)
def test_hand_worked_values(z, radius, expected):
    torch.testing.assert_close(
        sparsestmax(vector(*z), radius), vector(*expected), rtol=0, atol=1e-14
    )


# The radius


@pytest.mark.parametrize('radius', [0.0, -0.0, -1e-9, -3.0, -math.inf])
@pytest.mark.parametrize('size', SIZES)
def test_radius_of_zero_or_less_is_sparsemax(size, radius):
    z = torch.randn(50, size, dtype=torch.float64)
    expected = torch.stack([reference.sparsemax(row) for row in z])
    torch.testing.assert_close(sparsestmax(z, radius), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('size', SIZES)
def test_from_the_circumradius_on_exactly_one_hot(size, dtype):
    limit = math.sqrt((size - 1) / size)
    assert circumradius(size) == pytest.approx(limit)
    # Of every scale, and with sparsemax points all but on a vertex: a gap of one minus a little.
    gaps = torch.rand(2000, size, dtype=dtype) * 10 ** torch.empty(2000, 1, dtype=dtype).uniform_(
        -9, 4
    )
    nearly = -1 + torch.rand(2000, size, dtype=dtype) * 10 ** torch.empty(
        2000, 1, dtype=dtype
    ).uniform_(-17, -3)
    nearly[:, 0] = 0
    z = torch.cat((gaps, nearly))
    expected = torch.nn.functional.one_hot(
        size - 1 - z.flip(-1).argsort(dim=-1, descending=True, stable=True)[:, 0], size
    ).to(dtype)
    radii = {
        'python float': limit,
        'float32 buffer': torch.tensor(limit, dtype=torch.float32),
        'float64 buffer': torch.tensor(limit, dtype=torch.float64),
        'rounded up': 0.81650 if size == 3 else limit + 1e-4,
        'one': 1.0,
        'infinite': math.inf,
    }
    wrong = {
        name: (z[index].tolist(), p[index].tolist())
        for name, radius in radii.items()
        for p in [sparsestmax(z, radius)]
        for index in [(p != expected).any(-1).nonzero().flatten()[:1]]
        if len(index)
    }
    assert not wrong


def test_just_below_the_circumradius_is_not_one_hot():
    p = sparsestmax(vector(0.1, 0, -0.1), circumradius(3) - 1e-5)
    assert p[1] > 1e-6
    assert p[2] == 0


@pytest.mark.parametrize('radius', [0.0, 0.3, 0.6, 0.9])
def test_radius_as_tensor_equals_radius_as_float(radius):
    z = torch.randn(20, 3, dtype=torch.float64)
    expected = sparsestmax(z, radius)
    for shape in ((), (1,)):
        tensor = torch.full(shape, radius, dtype=torch.float64)
        assert torch.equal(sparsestmax(z, tensor), expected)
    torch.testing.assert_close(sparsestmax(z, torch.tensor(radius)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('radius', [1e-5, 1e-4, 3e-4, 1e-3, 1e-2])
@pytest.mark.parametrize('size', SIZES)
def test_small_radius_keeps_its_digits_in_float32(size, radius):
    # The first iterations of a run: the ratios are equal to a millionth and the radius is small.
    z = torch.arange(size, dtype=torch.float32).mul_(1e-6).requires_grad_()
    exact = z.detach().double().requires_grad_()
    p, expected = sparsestmax(z, radius), sparsestmax(exact, radius)
    torch.testing.assert_close(p.double(), expected, rtol=0, atol=1e-7)
    assert (expected - 1 / size).norm().item() == pytest.approx(radius)
    upstream = torch.randn(size)
    (dz,) = torch.autograd.grad(p, z, upstream)
    (expected_dz,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(dz.double(), expected_dz, rtol=1e-4, atol=1e-4)


def test_ratios_sharpen_with_the_radius():
    z = torch.randn(100, 4, dtype=torch.float64) * 0.1
    radii = torch.linspace(0, circumradius(4), 50).tolist()
    largest = torch.stack([sparsestmax(z, radius).amax(-1) for radius in radii])
    assert (largest.diff(dim=0) >= -1e-12).all()


# Shapes and dtypes


@pytest.mark.parametrize('dim', [0, 1, 2, -1, -2, -3])
def test_dim(dim):
    z = torch.randn(3, 4, 5, dtype=torch.float64)
    upstream = torch.randn(3, 4, 5, dtype=torch.float64)
    moved = z.movedim(dim, -1).reshape(-1, z.shape[dim]).clone().requires_grad_()
    rows = torch.stack([sparsestmax(row, 0.4) for row in moved])
    rows.backward(upstream.movedim(dim, -1).reshape(rows.shape))
    z.requires_grad_()
    p = sparsestmax(z, 0.4, dim)
    p.backward(upstream)
    assert torch.equal(p.movedim(dim, -1).reshape(rows.shape), rows)
    assert torch.equal(z.grad.movedim(dim, -1).reshape(rows.shape), moved.grad)


def test_non_contiguous_and_empty():
    z = torch.randn(6, 8, dtype=torch.float64)
    assert torch.equal(sparsestmax(z[::2, 1::3], 0.4), sparsestmax(z[::2, 1::3].contiguous(), 0.4))
    assert sparsestmax(z.t(), 0.4, dim=0).shape == (8, 6)
    assert sparsestmax(torch.empty(0, 3), 0.4).shape == (0, 3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    z = torch.randn(200, 3).to(dtype).requires_grad_()
    upstream = torch.randn(200, 3).to(dtype)
    for radius in (0.0, 0.35, 0.6, circumradius(3)):
        p = sparsestmax(z, radius)
        (dz,) = torch.autograd.grad(p, z, upstream)
        wide = z.detach().float().requires_grad_()
        expected = sparsestmax(wide, radius)
        (expected_dz,) = torch.autograd.grad(expected, wide, upstream.float())
        assert p.dtype == dz.dtype == dtype
        expected = expected.to(dtype)
        # Where the largest ratio rounds to one the vector is one-hot, whatever the others round to.
        one_hot = expected.amax(-1, keepdim=True) == 1
        assert torch.equal(p, torch.where(one_hot, (expected == 1).to(dtype), expected))
        assert torch.equal(dz, expected_dz.to(dtype))


# Gradients


@pytest.mark.parametrize('size', SIZES)
def test_gradcheck_away_from_kinks(size):
    # Every number of positive ratios, with the circle binding and not. A vertex binds nowhere: it
    # is sparsemax, or lies beyond the circumradius.
    wanted = {(count, binds): 4 for count in range(1, size + 1) for binds in (False, True)}
    del wanted[1, True]
    while any(wanted.values()):
        z, radius = random_problem(size)
        _, face, binds = best_point(z, radius)
        if not wanted.get((len(face), binds)) or not away_from_kinks(z, radius):
            continue
        wanted[len(face), binds] -= 1
        assert torch.autograd.gradcheck(lambda v, r=radius: sparsestmax(v, r), z.requires_grad_())


@pytest.mark.parametrize('radius', [0.0, 0.3, 0.6])
@pytest.mark.parametrize('dim', [0, 1, 2, -1, -2, -3])
def test_gradcheck_over_dims(dim, radius):
    rows = []
    while len(rows) < 4:
        z = torch.randn(3, dtype=torch.float64) * 0.3
        if away_from_kinks(z, radius):
            rows.append(z)
    z = torch.stack(rows).reshape(2, 2, 3).movedim(-1, dim).contiguous()
    assert torch.autograd.gradcheck(lambda v: sparsestmax(v, radius, dim), z.requires_grad_())


def test_hand_worked_jacobian_on_the_circle():
    # radius / distance * (projector on the direction tangential to the circle, (1, -2, 1)).
    tangent = vector(1, -2, 1) / math.sqrt(6)
    expected = 0.3 / (0.1 * math.sqrt(2)) * torch.outer(tangent, tangent)
    torch.testing.assert_close(jacobian(vector(0.1, 0, -0.1), 0.3), expected)


def test_two_ratios_on_a_binding_circle_cannot_move():
    assert jacobian(vector(0.6, 0.4, -0.3), 0.5).abs().max() == 0
    assert jacobian(vector(0.1, 0), 0.5).abs().max() == 0


def test_one_hot_has_no_gradient():
    for radius in (0.0, 0.7, circumradius(3), 1.0):
        assert jacobian(vector(3, 1, 0), radius).abs().max() == 0
    assert jacobian(vector(0.1, 0, -0.1), 1.0).abs().max() == 0


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_gradient_of_a_near_tie_is_exact_up_to_the_documented_bound(dtype):
    def norm(gap: float) -> float:
        return jacobian(torch.tensor([gap, 0, -gap], dtype=dtype), 0.3).norm().item()

    for gap in (1e-2, 1e-4, 1e-6):
        assert norm(gap) == pytest.approx(0.3 / (gap * math.sqrt(2)), rel=1e-5)
    for gap in (1e-7, 1e-12, 1e-30):
        assert norm(gap) == pytest.approx(1e6, rel=1e-5)


@pytest.mark.parametrize('power', [1, 2])
def test_second_derivatives_are_refused(power):
    z = torch.randn(3, requires_grad=True)
    loss = (sparsestmax(z, 0.3).pow(power) * torch.randn(3)).sum()
    (dz,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match='second derivative'):
        dz.sum().backward()


# Kinks: each path crosses one of them at t = 0

INTERIOR, FACE, SMALL = vector(0.5, 0.2, 0.1), vector(0.6, 0.4, -0.3), vector(0.1, 0, -0.1)
KINKS = {
    'an entry leaves the support of sparsemax': lambda t: (vector(0.5, -0.5 - t, -2), 0.0),
    'the circle begins to bind': lambda t: (INTERIOR, math.sqrt(78) / 30 + t),
    'the circle begins to bind on a face': lambda t: (FACE, math.sqrt(14 / 75) + t),
    'a ratio on the circle reaches zero': lambda t: (SMALL, math.sqrt(2) / 3 + t),
    'a ratio on the circle of four reaches zero': lambda t: (
        vector(0.03, 0.01, -0.01, -0.03),
        math.sqrt(5) / 6 + t,
    ),
}


@pytest.mark.parametrize('path', KINKS.values(), ids=KINKS)
def test_kink(path):
    step = 1e-7
    before, at, after = (sparsestmax(*path(t)) for t in (-step, 0, step))
    torch.testing.assert_close(before, at, rtol=0, atol=10 * step)
    torch.testing.assert_close(after, at, rtol=0, atol=10 * step)

    left, here, right = (jacobian(*path(t)) for t in (-step, 0, step))
    assert (left - right).norm() > 0.1  # there is a kink
    # On the kink the gradient is that of one side, not a mixture.
    assert min((here - left).norm(), (here - right).norm()) < 1e-4


def test_kink_at_the_circumradius():
    limit, step = circumradius(3), 1e-6
    before = sparsestmax(SMALL, limit - step)
    torch.testing.assert_close(before, vector(1, 0, 0), rtol=0, atol=10 * step)
    assert before[1] > 0
    assert sparsestmax(SMALL, limit).tolist() == [1, 0, 0]
    assert sparsestmax(SMALL, limit + step).tolist() == [1, 0, 0]


def test_kink_at_a_tie_of_two_takes_the_side_of_the_last():
    radius, root = 0.5, math.sqrt(1 / 24)
    first, last = vector(0.5 + root, 0.5 - root, 0), vector(0.5 - root, 0.5 + root, 0)
    for gap, expected in ((1e-9, first), (-1e-9, last), (0, last)):
        p = sparsestmax(vector(0.4 + gap, 0.4, -0.3), radius)
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-8)


# Ties


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('value', [0.0, 1 / 3, -7.3, 1e4])
@pytest.mark.parametrize('size', SIZES)
def test_tie_of_all_breaks_toward_the_last(size, value, dtype):
    for radius in (0.0, 1e-6, 0.2, 0.5, 0.7, circumradius(size), 1.0):
        z = torch.full((size,), value, dtype=dtype, requires_grad=True)
        p = sparsestmax(z, radius)
        reach = min(radius, circumradius(size))
        expected = torch.full((size,), 1 / size - reach / math.sqrt(size * (size - 1)))
        expected[-1] = 1 / size + reach * circumradius(size)
        torch.testing.assert_close(
            p, expected.to(dtype).clamp(min=0), rtol=0, atol=TOLERANCE[torch.float32]
        )
        if radius >= circumradius(size):
            assert p.tolist() == [0] * (size - 1) + [1]
            continue
        # The gradient is sparsemax's, whatever the radius.
        upstream = torch.randn(size, dtype=dtype)
        (dz,) = torch.autograd.grad(p, z, upstream)
        torch.testing.assert_close(dz, upstream - upstream.mean())


@pytest.mark.parametrize('dim', [0, 1, 2, -1, -2, -3])
def test_tie_along_every_dim(dim):
    shape = [2, 2, 2]
    shape[dim] = 3
    p = sparsestmax(torch.zeros(shape), 0.3, dim).movedim(dim, -1)
    expected = torch.tensor([1 / 3 - 0.3 / math.sqrt(6)] * 2 + [1 / 3 + 0.3 * math.sqrt(2 / 3)])
    torch.testing.assert_close(p, expected.expand_as(p))
    assert (sparsestmax(torch.zeros(shape), 1.0, dim).movedim(dim, -1)[..., -1] == 1).all()


HIGH = 0.5 + math.sqrt(1 / 24)
PARTIAL_TIES = {
    # A tie that decides: the circle cuts the edge of the equal entries in two points.
    'first two of three': ((0.4, 0.4, -0.3), 0.5, (1 - HIGH, HIGH, 0)),
    'outer two of three': ((0.4, -0.3, 0.4), 0.5, (1 - HIGH, 0, HIGH)),
    'last two of three': ((-0.3, 0.4, 0.4), 0.5, (0, 1 - HIGH, HIGH)),
    # Face of three, of radius sqrt(1/4 - 1/12): centre + that radius toward the last of the equal.
    'three of four': ((0.2, 0.2, -1.0, 0.2), 0.5, (1 / 6, 1 / 6, 0, 2 / 3)),
    # Equal entries that do not decide: the minimiser is unique and keeps them equal.
    'two largest, small circle': (
        (0.1, 0.1, 0.0),
        0.2,
        (1 / 3 + 0.2 / math.sqrt(6),) * 2 + (1 / 3 - 0.4 / math.sqrt(6),),
    ),
    'two smallest': (
        (0.1, 0.0, 0.0),
        0.7,
        (1 / 3 + 1.4 / math.sqrt(6),) + (1 / 3 - 0.7 / math.sqrt(6),) * 2,
    ),
    'circle that does not bind': ((0.4, 0.4, -0.3), 0.4, (0.5, 0.5, 0)),
    'one-hot of the last of the largest': ((0.4, 0.4, -0.3), 1.0, (0, 1, 0)),
    'one-hot beside equal losers': ((0.0, 0.1, 0.0), 1.0, (0, 1, 0)),
}


@pytest.mark.parametrize(('z', 'radius', 'expected'), PARTIAL_TIES.values(), ids=PARTIAL_TIES)
def test_partial_tie(z, radius, expected):
    z, expected = vector(*z), vector(*expected)
    p = sparsestmax(z, radius)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-14)
    # Whichever minimiser it is, it is one: no point of a grid is better.
    grid = simplex_grid(len(z), 60)
    feasible = grid[(grid - 1 / len(z)).norm(dim=-1) >= radius]
    if len(feasible):  # beyond the circumradius there is none
        assert objective(p, z) <= objective(feasible, z).min() + 1e-12
    assert jacobian(z, radius).norm() < 10


@pytest.mark.parametrize('size', [3, 4, 5])
def test_partial_tie_equals_the_tie_of_a_smaller_face(size):
    # One entry far below: the rest is a tie of size - 1, in any position.
    radius = 0.97 * circumradius(size)
    for low in range(size):
        z = torch.zeros(size, dtype=torch.float64)
        z[low] = -5
        p = sparsestmax(z, radius)
        tied = [k for k in range(size) if k != low]
        assert p[low] == 0
        assert p[tied].argmax() == size - 2
        assert (p - 1 / size).norm().item() == pytest.approx(radius)
        assert p[tied[:-1]].max() - p[tied[:-1]].min() < 1e-15


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('gap', [1e-7, 1e-12, 1e-30])
@pytest.mark.parametrize('size', SIZES)
def test_near_tie_stays_on_the_simplex(size, gap, dtype):
    for radius in (0.0, 1e-7, 0.1, 0.3, 0.6, circumradius(size) - 1e-7, circumradius(size), 1.0):
        z = torch.randn(200, size, dtype=dtype) * gap
        z = torch.cat(
            (z, torch.zeros(size, size, dtype=dtype).fill_diagonal_(gap))
        ).requires_grad_()
        p = sparsestmax(z, radius)
        tolerance = TOLERANCE[dtype]
        assert p.min() >= 0
        torch.testing.assert_close(p.sum(-1), torch.ones_like(p[:, 0]), rtol=0, atol=tolerance)
        assert ((p - 1 / size).norm(dim=-1) >= min(radius, circumradius(size)) - tolerance).all()
        upstream = torch.randn_like(p)
        (dz,) = torch.autograd.grad(p, z, upstream)
        assert (dz.norm(dim=-1) <= 1.001e6 * upstream.norm(dim=-1)).all()


# Bad values


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('radius', [0.0, 0.4, circumradius(3), 1.0])
def test_nan_and_inf_propagate_as_nan_and_only_in_their_vector(bad, radius):
    clean = torch.randn(4, 3)
    z = clean.clone()
    z[1, 2] = bad
    z.requires_grad_()
    p = sparsestmax(z, radius)
    assert p[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(p[others], sparsestmax(clean, radius)[others])
    p[others].sum().backward()
    assert z.grad[others].isfinite().all()


def test_all_infinite_is_nan():
    assert sparsestmax(torch.full((3,), -math.inf), 1.0).isnan().all()
    assert sparsestmax(torch.full((3,), math.inf), 1.0).isnan().all()


def test_radius_tensor_of_nan_makes_nan():
    assert sparsestmax(torch.randn(2, 3), torch.tensor(math.nan)).isnan().all()


# Neither synchronisation nor branches on values


def test_no_value_is_read_on_the_host():
    with FakeTensorMode():
        with pytest.raises(DataDependentOutputException):
            torch.ones(()).item()  # what this mode is for
        z = torch.randn(4, 3, requires_grad=True)
        for radius in (0.4, torch.tensor(0.4)):
            p = sparsestmax(z, radius)
            p.backward(torch.randn_like(p))
        assert z.grad.shape == (4, 3)


@ONE_GRAPH
def test_traces_as_one_graph():
    compiled = torch.compile(sparsestmax, fullgraph=True, backend='aot_eager')
    z = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(8, 3, dtype=torch.float64)
    for radius in (0.0, 0.4, 1.0):
        radius = torch.tensor(radius)
        results = [f(z, radius) for f in (compiled, sparsestmax)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(p, z, upstream)[0] for p in results))


def test_backward_is_written_by_hand():
    p = sparsestmax(torch.randn(3, requires_grad=True).unsqueeze(0), 0.4)
    names, node = [], p.grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    assert [name for name in names if 'SparsestMaxFunction' in name]
    assert len(names) <= 5  # it, the moves of the dimension, unsqueeze and the leaf


@pytest.mark.parametrize('size', [2, 3, 10])
def test_circumradius_is_the_distance_of_a_vertex(size):
    vertex = torch.eye(size, dtype=torch.float64)[0]
    assert circumradius(size) == pytest.approx((vertex - 1 / size).norm().item())
