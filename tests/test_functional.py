"""The public functions: what they reject and how, running statistics, empty input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssn_plugin import sparsestmax, switchable_norm
from ssn_plugin.functional import check_normalizers, check_not_negative

EQUAL = torch.full((3,), 1 / 3)
ONLY_BN = torch.tensor([0.0, 0, 1])

# What is passed, and all that the message must hold: argument, value, expectation.
BAD_SPARSESTMAX = {
    'integers': (dict(z=torch.arange(3)), ('z:', 'torch.int64', 'floating-point')),
    'list': (dict(z=[0.1, 0.2]), ('z:', 'list', 'floating-point')),
    'scalar': (dict(z=torch.tensor(1.0)), ('z:', '()', 'at least 2')),
    'one candidate': (dict(z=torch.randn(4, 1)), ('z:', '(4, 1)', 'at least 2', 'dim=-1')),
    'one candidate along dim': (dict(z=torch.randn(1, 4), dim=0), ('z:', '(1, 4)', 'dim=0')),
    'NaN': (dict(radius=math.nan), ('radius:', 'nan', 'number')),
    'string': (dict(radius='0.5'), ('radius:', "'0.5'", 'number')),
    'bool': (dict(radius=True), ('radius:', 'True', 'number')),
    'none': (dict(radius=None), ('radius:', 'None', 'number')),
    'radius per vector': (dict(radius=torch.ones(2)), ('radius:', '(2,)', 'one element')),
}


@pytest.mark.parametrize(('given', 'said'), BAD_SPARSESTMAX.values(), ids=BAD_SPARSESTMAX)
def test_sparsestmax_says_what_is_wrong(given, said):
    with pytest.raises(ValueError, match='expected') as caught:
        sparsestmax(**(dict(z=torch.randn(2, 3), radius=0.3) | given))
    assert all(part in str(caught.value) for part in said)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('dim', [2, -3])
def test_sparsestmax_dim_out_of_range(dim):
    with pytest.raises(IndexError, match='out of range'):
        sparsestmax(torch.randn(2, 3), 0.3, dim)


def test_sparsestmax_misspelt_keyword():
    with pytest.raises(TypeError, match='axis'):
        sparsestmax(torch.randn(3), 0.3, axis=0)


BAD_NORM = {
    'one dimension': (dict(x=torch.randn(6)), ('x:', '(6,)', '(N, C, ...)')),
    'too few mean ratios': (
        dict(mean_ratios=torch.ones(2)),
        ('mean_ratios:', '(2,)', 'expected (3,)'),
    ),
    'too many variance ratios': (
        dict(var_ratios=torch.ones(4)),
        ('var_ratios:', '(4,)', 'expected (3,)'),
    ),
    'ratios per sample': (dict(mean_ratios=torch.ones(2, 3)), ('mean_ratios:', '(2, 3)')),
    'weight': (dict(weight=torch.ones(5)), ('weight:', '(5,)', 'expected (6,)')),
    'bias': (dict(bias=torch.ones(1, 6)), ('bias:', '(1, 6)', 'expected (6,)')),
    'running_mean': (
        dict(running_mean=torch.ones(5), running_var=torch.ones(6)),
        ('running_mean:', '(5,)', 'expected (6,)'),
    ),
    'running_var': (
        dict(running_mean=torch.ones(6), running_var=torch.ones(5)),
        ('running_var:', '(5,)', 'expected (6,)'),
    ),
    'running_mean alone': (dict(running_mean=torch.ones(6)), ('running_var:', 'None')),
    'running_var alone': (dict(running_var=torch.ones(6)), ('running_mean:', 'None')),
    'integers': (dict(x=torch.ones(2, 6, 4, 4).long()), ('x:', 'torch.int64', 'floating-point')),
    'unknown name': (
        dict(normalizers=('IN', 'XN', 'BN')),
        ('normalizers:', 'XN', 'IN, LN, BN, GN'),
    ),
    'a string': (dict(normalizers='IN'), ('normalizers:', "'IN'", 'names')),
    'one name': (dict(normalizers=('IN',)), ('normalizers:', "('IN',)", 'at least 2')),
    'a name twice': (
        dict(normalizers=('IN', 'IN', 'BN')),
        ('normalizers:', "('IN', 'IN', 'BN')", 'different'),
    ),
    'no group': (
        dict(normalizers=('IN', 'GN', 'BN'), num_groups=0),
        ('num_groups:', '0', 'positive integer'),
    ),
    'correction': (dict(correction=2), ('correction:', '2', '0 or 1')),
    'negative correction': (dict(correction=-1), ('correction:', '-1', '0 or 1')),
}


@pytest.mark.parametrize(('given', 'said'), BAD_NORM.values(), ids=BAD_NORM)
def test_switchable_norm_says_what_is_wrong(given, said):
    arguments = dict(x=torch.randn(2, 6, 4, 4), mean_ratios=EQUAL, var_ratios=EQUAL) | given
    with pytest.raises(ValueError, match=r'got .*, expected') as caught:
        switchable_norm(**arguments)
    assert all(part in str(caught.value) for part in said)
    assert '\n' not in str(caught.value)


def test_switchable_norm_misspelt_keyword():
    with pytest.raises(TypeError, match='epsilon'):
        switchable_norm(torch.randn(2, 6, 4, 4), EQUAL, EQUAL, epsilon=1e-5)


def test_candidates_become_a_tuple():
    assert check_normalizers(['IN', 'BN']) == ('IN', 'BN')


@pytest.mark.parametrize(
    ('channels', 'asked', 'groups'),
    [(64, 32, 32), (48, 32, 24), (6, 4, 3), (7, 32, 7), (67, 32, 1), (16, 32, 16), (1, 32, 1)],
)
def test_groups_are_the_largest_divisor_up_to_what_is_asked(channels, asked, groups):
    x = torch.randn(2, channels, 3, 3)
    ratios = torch.tensor([0.0, 1.0])
    y = switchable_norm(x, ratios, ratios, normalizers=('BN', 'GN'), num_groups=asked)
    assert torch.allclose(y, torch.nn.functional.group_norm(x, groups), atol=1e-5)


@pytest.mark.parametrize('radius', [-1e-9, -1, math.nan, -math.inf, '1', None, True])
def test_check_not_negative_rejects(radius):
    with pytest.raises(ValueError, match=r'radius: got .*, expected a number of at least 0'):
        check_not_negative(radius, 'radius')


@pytest.mark.parametrize('radius', [0, 1, 0.5, math.inf])
def test_check_not_negative_returns_a_float(radius):
    assert type(check_not_negative(radius, 'radius')) is float
    assert check_not_negative(radius, 'radius') == radius


# Running statistics


@pytest.mark.parametrize('momentum', [0.0, 0.1, 1.0])
@pytest.mark.parametrize('shape', [(4, 6, 5, 5), (4, 6), (1, 6, 3, 3), (3, 6, 1, 1)])
def test_running_statistics_are_those_of_batch_norm(shape, momentum):
    found, expected = ((torch.randn(6), torch.rand(6)) for _ in range(2))
    for mine, theirs in zip(found, expected, strict=True):
        theirs.copy_(mine)
    for _ in range(3):
        x = torch.randn(shape) * 2 + 1
        y = switchable_norm(x, EQUAL, EQUAL, None, None, *found, momentum=momentum)
        F.batch_norm(x, *expected, training=True, momentum=momentum)
        assert y.shape == shape
    torch.testing.assert_close(found, expected)


def test_running_statistics_do_not_depend_on_the_ratios_and_carry_no_graph():
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    found = []
    for ratios in (EQUAL, ONLY_BN):
        found.append((torch.zeros(6), torch.ones(6)))
        switchable_norm(x, ratios, ratios, None, None, *found[-1])
    torch.testing.assert_close(*found)
    assert not any(vector.requires_grad for pair in found for vector in pair)


def test_running_variance_with_correction_is_the_one_that_normalises():
    x = torch.randn(4, 6, 5, 5) * 2 + 1
    running = torch.zeros(6), torch.zeros(6)
    switchable_norm(x, EQUAL, EQUAL, None, None, *running, momentum=1.0, correction=1)
    mean = x.mean((0, 2, 3))
    expected = (x.var((2, 3)) + x.mean((2, 3)) ** 2).mean(0) - mean**2
    torch.testing.assert_close(running, (mean, expected))


def test_evaluation_uses_running_statistics_and_leaves_them_alone():
    x = torch.randn(4, 6, 5, 5)
    running = torch.randn(6), torch.rand(6)
    before = [vector.clone() for vector in running]
    y = switchable_norm(x, ONLY_BN, ONLY_BN, None, None, *running, training=False)
    torch.testing.assert_close(y, F.batch_norm(x, *running, training=False))
    assert all(map(torch.equal, running, before))


def test_evaluation_without_running_statistics_uses_the_batch():
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(
        switchable_norm(x, ONLY_BN, ONLY_BN, training=False),
        F.batch_norm(x, None, None, training=True),
    )


def test_running_statistics_without_bn_stay():
    x, half = torch.randn(4, 6, 5, 5), torch.tensor([0.5, 0.5])
    running = torch.zeros(6), torch.ones(6)
    for training in (True, False):
        switchable_norm(
            x, half, half, None, None, *running, training=training, normalizers=('IN', 'LN')
        )
    assert running[0].tolist() == [0] * 6
    assert running[1].tolist() == [1] * 6


# Empty input


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape', [(0, 6), (0, 6, 4), (0, 6, 4, 4), (2, 6, 0, 4), (0, 6, 2, 3, 4)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_empty_input_comes_back_as_from_batch_norm(shape, training, dtype):
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    leaves = [torch.randn(6, requires_grad=True) for _ in range(2)]
    ratios = [torch.full((3,), 1 / 3, requires_grad=True) for _ in range(2)]
    running = torch.randn(6), torch.rand(6)
    before = [vector.clone() for vector in running]
    y = switchable_norm(x, *ratios, *leaves, *running, training=training)
    assert y.shape == norm(6).train(training)(torch.randn(shape)).shape
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == shape
    for leaf in (*leaves, *ratios):
        assert leaf.grad.shape == leaf.shape
        assert (leaf.grad == 0).all()
    assert all(map(torch.equal, running, before))


@pytest.mark.parametrize(('mean', 'var'), [(1.0, 0.5), (0.5, 1.0), (1.0, 1.0)])
def test_ratios_of_one_candidate_need_not_be_one(mean, var):
    """Given ratios are taken as they are, on the simplex or not."""
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64) + 1
    first = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    y = switchable_norm(x, mean * first, var * first, eps=0.0)
    own = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    expected = (x - mean * own[0]) / (var * own[1]).sqrt()
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
