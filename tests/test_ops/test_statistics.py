"""The law of total variance and its adjoint, against direct moments of x and against autograd."""

import itertools

import pytest
import torch

from ssn_plugin.ops.statistics import (
    NORMALIZERS,
    Moments,
    batch_statistics,
    candidate_statistics,
    correct_row_variance,
    element_gradients,
    mix,
    ratio_gradients,
    row_gradients,
)

NUM, CHANNELS, GROUPS, LENGTH = 3, 6, 2, 10
SHAPE = (NUM, CHANNELS)
SUBSETS = [subset for count in (2, 3, 4) for subset in itertools.combinations(NORMALIZERS, count)]
# What each normalizer averages over, of x reshaped to (N, G, C / G, S).
POOLED = {'IN': (3,), 'LN': (1, 2, 3), 'GN': (2, 3), 'BN': (0, 3)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rows_of(x: torch.Tensor, correction: int = 0) -> Moments:
    var, mean = torch.var_mean(x, -1, correction=0)
    return Moments(mean, correct_row_variance(var, x.shape[-1], correction))


def random_rows() -> Moments:
    return Moments(random(*SHAPE), random(*SHAPE).square())


def statistics(rows: Moments, normalizers=NORMALIZERS, batch: Moments | None = None) -> list:
    return candidate_statistics(
        rows, batch_statistics(rows) if batch is None else batch, normalizers, GROUPS
    )


@pytest.mark.parametrize('normalizer', NORMALIZERS)
def test_statistics_are_the_moments_of_x(normalizer):
    x = random(NUM, CHANNELS, LENGTH) * 3 + 5
    (found,) = statistics(rows_of(x), [normalizer])
    split = x.reshape(NUM, GROUPS, -1, LENGTH)
    var, mean = torch.var_mean(split, POOLED[normalizer], correction=0, keepdim=True)
    expected = Moments(*(m.expand(*split.shape[:3], 1).reshape(SHAPE) for m in (mean, var)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('normalizer', NORMALIZERS)
def test_corrected_statistics_are_those_of_the_release(normalizer):
    # mean(unbiased var_in + mean_in^2) - mean^2, over the rows that share a statistic.
    x = random(NUM, CHANNELS, LENGTH) * 3 + 5
    mean_in, var_in = x.mean(-1), x.var(-1)
    (found,) = statistics(rows_of(x, correction=1), [normalizer])
    if normalizer == 'IN':
        torch.testing.assert_close(found, Moments(mean_in, var_in))
        return
    groups = {'LN': 1, 'GN': GROUPS, 'BN': GROUPS}[normalizer]
    dims = (0,) if normalizer == 'BN' else (2,)
    split = (NUM, groups, -1)
    mean = mean_in.reshape(split).mean(dims, keepdim=True)
    second = (var_in + mean_in**2).reshape(split).mean(dims, keepdim=True)
    shape = (NUM, groups, CHANNELS // groups)
    expected = Moments(*(m.expand(shape).reshape(SHAPE) for m in (mean, second - mean**2)))
    torch.testing.assert_close(found, expected)


def test_hand_worked_statistics():
    # Two samples, two channels: means 0, 2 and 4, 6, variances 1, 1 and 3, 3.
    rows = Moments(torch.tensor([[0.0, 2], [4, 6]]), torch.tensor([[1.0, 1], [3, 3]]))
    instance, layer, batch = statistics(rows, ('IN', 'LN', 'BN'))
    torch.testing.assert_close(instance, rows)
    # Along channels the means 0, 2 lie 1 from 1, the means 4, 6 lie 1 from 5.
    torch.testing.assert_close(
        layer, Moments(torch.tensor([[1.0, 1], [5, 5]]), torch.tensor([[2.0, 2], [4, 4]]))
    )
    # Along samples the means 0, 4 lie 2 from 2; the variances 1, 3 have mean 2.
    torch.testing.assert_close(
        batch, Moments(torch.tensor([[2.0, 4], [2, 4]]), torch.tensor([[6.0, 6], [6, 6]]))
    )


def test_row_of_one_element_keeps_its_zero():
    var = torch.zeros(2, 3)
    for correction in (0, 1):
        assert torch.equal(correct_row_variance(var, 1, correction), var)
    assert correct_row_variance(torch.ones(1), 4, 1).item() == pytest.approx(4 / 3)
    assert correct_row_variance(torch.ones(1), 4, 0).item() == 1


def test_large_mean_does_not_cancel_the_variance():
    rows = Moments(torch.full(SHAPE, 1e4), torch.full(SHAPE, 1e-2))
    for found in statistics(rows):
        torch.testing.assert_close(found.var, rows.var, rtol=1e-6, atol=0)


def test_given_batch_statistics_are_used_as_they_are():
    rows, batch = random_rows(), Moments(random(1, CHANNELS), random(1, CHANNELS).square())
    (found,) = statistics(rows, ['BN'], batch)
    torch.testing.assert_close(found, Moments(*(m.expand(SHAPE) for m in batch)))


def test_mix_is_the_weighted_sum():
    candidates = [random_rows() for _ in range(3)]
    p, q = random(3), random(3)
    mixed = mix(candidates, p, q)
    torch.testing.assert_close(mixed.mean, sum(p[k] * candidates[k].mean for k in range(3)))
    torch.testing.assert_close(mixed.var, sum(q[k] * candidates[k].var for k in range(3)))


@pytest.mark.parametrize('running', [False, True], ids=['batch', 'running'])
@pytest.mark.parametrize('normalizers', SUBSETS, ids='-'.join)
def test_adjoint_equals_autograd(normalizers, running):
    rows = Moments(*(m.requires_grad_() for m in random_rows()))
    batch = None
    if running:
        batch = Moments(random(1, CHANNELS), random(1, CHANNELS).square())
    p, q = (random(len(normalizers)).requires_grad_() for _ in range(2))
    candidates = statistics(rows, normalizers, batch)
    mixed = mix(candidates, p, q)
    grad = Moments(random(*SHAPE), random(*SHAPE))
    *expected_rows, expected_p, expected_q = torch.autograd.grad(mixed, (*rows, p, q), grad)

    with torch.no_grad():
        uses_batch = 'BN' in normalizers and not running
        found = row_gradients(
            rows, batch_statistics(rows) if uses_batch else None, normalizers, GROUPS, p, q, grad
        )
        torch.testing.assert_close(found, Moments(*expected_rows))
        torch.testing.assert_close(ratio_gradients(candidates, grad), (expected_p, expected_q))


@pytest.mark.parametrize('length', [1, 2, LENGTH])
@pytest.mark.parametrize('correction', [0, 1])
def test_element_gradients_equal_autograd(correction, length):
    x = random(*SHAPE, length).requires_grad_()
    rows = rows_of(x, correction)
    grad = Moments(random(*SHAPE), random(*SHAPE))
    (expected,) = torch.autograd.grad(rows, x, grad)
    with torch.no_grad():
        offset, slope = element_gradients(rows, grad, length, correction)
        torch.testing.assert_close(slope[..., None] * x + offset[..., None], expected)
