"""The law of total variance and its adjoint, against direct moments of x and against autograd."""

import itertools

import pytest
import torch

from ssn_plugin.ops import reference
from ssn_plugin.ops.switchable_norm.ratios import Ratios
from ssn_plugin.ops.switchable_norm.statistics import (
    NORMALIZERS,
    Moments,
    Settings,
    mix_statistics,
    pool_size,
    pool_total,
    row_factor,
    row_gradients,
)

NUM, CHANNELS, GROUPS, LENGTH = 3, 6, 2, 10
SHAPE = (NUM, CHANNELS)
FOUR = ('IN', 'LN', 'BN', 'GN')  # of which hand-made ratios and choices are
SUBSETS = [subset for count in (2, 3, 4) for subset in itertools.combinations(NORMALIZERS, count)]
EPS = 1e-5
# Sets of candidates that take part, out of four: all, some, one, and not the same on both sides.
ACTIVE = [
    ((0, 1, 2, 3), (0, 1, 2, 3)),
    ((0, 2), (1, 3)),
    ((1,), (2,)),
    ((2,), (0,)),
    ((0,), (1, 2)),
    ((3,), (3,)),
]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def settings(normalizers=FOUR, correction: int = 0) -> Settings:
    return Settings(tuple(normalizers), GROUPS, correction, EPS)


def rows_of(x: torch.Tensor, correction: int = 0) -> Moments:
    var, mean = torch.var_mean(x, -1, correction=0)
    return Moments(mean, var * row_factor(x.shape[-1], correction))


def ratios_of(values: torch.Tensor, on_host: bool, active=None, on_simplex=False) -> Ratios:
    active = list(range(len(values))) if active is None else list(active)
    listed = values.tolist() if on_host else values.unbind()
    return Ratios(listed, active, active, on_simplex=on_simplex)


def mixed_moments(rows: Moments, mixed) -> Moments:
    return Moments(
        (rows.mean - mixed.distance).expand(SHAPE),
        (mixed.inverse_std**-2 - EPS).expand(SHAPE),
    )


def assert_equals(found: Moments, expected) -> None:
    for name, value, other in zip(('mean', 'var'), found, expected, strict=True):
        torch.testing.assert_close(
            value, other.expand(SHAPE), msg=lambda message, n=name: f'{n}: {message}'
        )


@pytest.mark.parametrize('on_host', [True, False], ids=['numbers', 'tensors'])
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('normalizer', NORMALIZERS)
def test_one_candidate_alone_is_its_definition(normalizer, correction, on_host):
    x = random(NUM, CHANNELS, LENGTH) * 3 + 5
    k = NORMALIZERS.index(normalizer)
    one_hot = torch.zeros(len(NORMALIZERS), dtype=torch.float64)
    one_hot[k] = 1
    ratios = ratios_of(one_hot, on_host, [k] if on_host else None)
    rows = rows_of(x, correction)
    mixed = mix_statistics(rows, ratios, ratios, None, settings(NORMALIZERS, correction))
    expected = reference.normalizer_statistics(x, normalizer, GROUPS, correction)
    assert_equals(mixed_moments(rows, mixed), expected)


@pytest.mark.parametrize('on_host', [True, False], ids=['numbers', 'tensors'])
@pytest.mark.parametrize('running', [False, True], ids=['batch', 'running'])
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('normalizers', SUBSETS, ids='-'.join)
def test_mixture_is_the_weighted_sum(normalizers, correction, running, on_host):
    x = random(NUM, CHANNELS, LENGTH) * 3 + 5
    # Not summing to one: nothing may rely on that unless it is told so.
    p, q = random(len(normalizers)), random(len(normalizers)).square()
    batch = Moments(random(CHANNELS), random(CHANNELS).square()) if running else None
    rows = rows_of(x, correction)
    mixed = mix_statistics(
        rows,
        ratios_of(p, on_host),
        ratios_of(q, on_host),
        batch,
        settings(normalizers, correction),
    )
    statistics = [
        batch
        if running and name == 'BN'
        else reference.normalizer_statistics(x, name, GROUPS, correction)
        for name in normalizers
    ]
    expected = [
        sum(ratio * s[i].expand(SHAPE) for ratio, s in zip(ratios, statistics, strict=True))
        for i, ratios in enumerate((p, q))
    ]
    assert_equals(mixed_moments(rows, mixed), expected)


@pytest.mark.parametrize(('in_mean', 'in_var'), ACTIVE)
def test_what_takes_no_part_is_not_computed(in_mean, in_var):
    rows = rows_of(random(NUM, CHANNELS, LENGTH))
    p, q = random(2, 4).softmax(-1)
    mean, var = ratios_of(p, True, in_mean, True), ratios_of(q, True, in_var)
    mixed = mix_statistics(rows, mean, var, None, settings())
    for k, name in enumerate(FOUR):
        used = k in in_mean or k in in_var
        assert (mixed.deviations[k] is not None) == (used and name != 'IN')
        assert (mixed.totals[k] is not None) == (k in in_var)


def test_batch_statistics_on_demand():
    rows = rows_of(random(NUM, CHANNELS, LENGTH))
    only_in = ratios_of(torch.tensor([1.0, 0, 0, 0]), True, [0], True)
    mixed = mix_statistics(rows, only_in, only_in, None, settings(), batch_too=True)
    k = FOUR.index('BN')
    mean = (rows.mean - mixed.deviations[k])[0]
    torch.testing.assert_close(mean, rows.mean.mean(0))
    expected = rows.var.mean(0) + rows.mean.var(0, correction=0)
    torch.testing.assert_close(mixed.totals[k] / NUM, expected)
    assert mixed.distance.abs().max() == 0
    torch.testing.assert_close(mixed.inverse_std, (rows.var + EPS).rsqrt())


def test_hand_worked_statistics():
    # Two samples, two channels: means 0, 2 and 4, 6, variances 1, 1 and 3, 3.
    rows = Moments(torch.tensor([[0.0, 2], [4, 6]]), torch.tensor([[1.0, 1], [3, 3]]))
    names = ('IN', 'LN', 'BN')
    expected = {
        'IN': rows,
        # Along channels the means 0, 2 lie 1 from 1, the means 4, 6 lie 1 from 5.
        'LN': Moments(torch.tensor([[1.0, 1], [5, 5]]), torch.tensor([[2.0, 2], [4, 4]])),
        # Along samples the means 0, 4 lie 2 from 2; the variances 1, 3 have mean 2.
        'BN': Moments(torch.tensor([[2.0, 4], [2, 4]]), torch.tensor([[6.0, 6], [6, 6]])),
    }
    for k, name in enumerate(names):
        ratios = ratios_of(torch.eye(3)[k], True, [k], True)
        mixed = mix_statistics(rows, ratios, ratios, None, Settings(names, 1, 0, 0.0))
        mean = (rows.mean - mixed.distance).expand(2, 2)
        torch.testing.assert_close(mean, expected[name].mean)
        torch.testing.assert_close((mixed.inverse_std**-2).expand(2, 2), expected[name].var)


def test_row_factor():
    assert row_factor(4, 1) == pytest.approx(4 / 3)
    assert row_factor(4, 0) == 1
    assert row_factor(1, 1) == row_factor(1, 0) == 1  # a row of one element keeps its zero


@pytest.mark.parametrize('normalizer', NORMALIZERS)
def test_pools(normalizer):
    values = random(*SHAPE)
    split = values.reshape(NUM, GROUPS, -1)
    expected = {
        'IN': values,
        'LN': values.sum(1, keepdim=True),
        'BN': values.sum(0),
        'GN': split.sum(-1, keepdim=True).expand_as(split).reshape(SHAPE),
    }[normalizer]
    torch.testing.assert_close(pool_total(values, normalizer, GROUPS), expected)
    ones = pool_total(torch.ones(SHAPE), normalizer, GROUPS)
    assert (ones == pool_size(normalizer, SHAPE, GROUPS)).all()


def test_large_mean_does_not_cancel_the_variance():
    rows = Moments(torch.full(SHAPE, 1e4), torch.full(SHAPE, 1e-2))
    for k in range(4):
        ratios = ratios_of(torch.eye(4)[k], True, [k], True)
        mixed = mix_statistics(rows, ratios, ratios, None, settings())
        torch.testing.assert_close(
            mixed_moments(rows, mixed).var, rows.var, rtol=1e-3, atol=0
        )  # eps is subtracted again


def gradients(x, p, q, batch, grad, normalizers, correction, on_host, active, on_simplex):
    """Adjoint of the mixed moments in hand-written form: dx and those of both ratio vectors."""
    rows = rows_of(x, correction)
    mean = ratios_of(p, on_host, active[0], on_simplex)
    var = ratios_of(q, on_host, active[1], on_simplex)
    given = settings(normalizers, correction)
    mixed = mix_statistics(rows, mean, var, batch, given)
    found = row_gradients(
        Moments(-grad.mean, -2 * grad.var),
        rows,
        mixed,
        mean,
        var,
        batch is not None,
        given,
        x.shape[-1],
    )
    dx = found.offset.expand(SHAPE)[..., None].expand_as(x)
    if found.slope is not None:
        dx = dx + found.slope.expand(SHAPE)[..., None] * (x - rows.mean[..., None])
    return dx, found.mean_ratios, found.var_ratios


@pytest.mark.parametrize('on_host', [True, False], ids=['numbers', 'tensors'])
@pytest.mark.parametrize('length', [1, LENGTH])
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('running', [False, True], ids=['batch', 'running'])
@pytest.mark.parametrize('normalizers', SUBSETS, ids='-'.join)
def test_adjoint_equals_autograd(normalizers, running, correction, length, on_host):
    x = random(NUM, CHANNELS, length).requires_grad_()
    batch = Moments(random(CHANNELS), random(CHANNELS).square()) if running else None
    p, q = (random(len(normalizers)).requires_grad_() for _ in range(2))
    means, variances = (
        torch.stack(
            [
                (
                    batch[i]
                    if running and name == 'BN'
                    else reference.normalizer_statistics(x, name, GROUPS, correction)[i]
                ).expand(SHAPE)
                for name in normalizers
            ],
            -1,
        )
        for i in range(2)
    )
    grad = Moments(random(*SHAPE), random(*SHAPE))
    expected = torch.autograd.grad((means @ p, variances @ q), (x, p, q), grad)

    everything = range(len(normalizers))
    with torch.no_grad():
        dx, dp, dq = gradients(
            x, p, q, batch, grad, normalizers, correction, on_host, (None, None), False
        )
    torch.testing.assert_close(dx, expected[0])
    for found, other in ((dp, expected[1]), (dq, expected[2])):
        assert list(found) == list(everything)
        values = torch.stack([torch.as_tensor(found[k], dtype=x.dtype) for k in everything])
        torch.testing.assert_close(values, other)


@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize(('in_mean', 'in_var'), ACTIVE)
def test_adjoint_of_some_is_that_of_all_with_the_others_at_zero(in_mean, in_var, correction):
    x = random(NUM, CHANNELS, LENGTH)
    grad = Moments(random(*SHAPE), random(*SHAPE))
    p, q = torch.zeros(2, 4, dtype=torch.float64)
    p[list(in_mean)] = random(len(in_mean)).softmax(0)
    q[list(in_var)] = random(len(in_var)).softmax(0)
    arguments = (x, p, q, None, grad, FOUR, correction, True)
    expected_dx, expected_dp, expected_dq = gradients(*arguments, (None, None), False)
    dx, dp, dq = gradients(*arguments, (in_mean, in_var), True)
    torch.testing.assert_close(dx, expected_dx)
    assert set(dp) == set(in_mean)
    assert set(dq) == set(in_var)
    for k in in_var:
        assert dq[k] == pytest.approx(expected_dq[k])
    # On the simplex they count up to a common number.
    offsets = [dp[k] - expected_dp[k] for k in in_mean]
    assert offsets == pytest.approx([offsets[0]] * len(offsets))
