"""SelectedNorm: the mean of one normalizer and the variance of another, and nothing else."""

import copy
import itertools

import pytest
import torch
from random_state import randomize_affine_and_running
from since import EXPORT, ONE_GRAPH
from torch.utils._python_dispatch import TorchDispatchMode

from ssn_plugin import SelectedNorm
from ssn_plugin.ops import reference

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
PAIRS = list(itertools.product(NORMALIZERS, NORMALIZERS))
CHANNELS, GROUPS = 6, 3


def layer_of(mean: str, var: str, **settings) -> SelectedNorm:
    layer = SelectedNorm(CHANNELS, mean, var, eps=1e-3, num_groups=GROUPS, **settings)
    randomize_affine_and_running(layer)
    return layer


def formula(layer: SelectedNorm, x: torch.Tensor, running: bool) -> torch.Tensor:
    ratios = [
        x.new_tensor([float(name == source) for name in NORMALIZERS])
        for source in (layer.mean_source, layer.var_source)
    ]
    statistics = (layer.running_mean, layer.running_var)
    if statistics[0] is None or not running:
        statistics = (None, None)
    return reference.switchable_norm(
        x,
        *ratios,
        layer.weight,
        layer.bias,
        NORMALIZERS,
        GROUPS,
        layer.correction,
        layer.eps,
        *statistics,
    )


@pytest.mark.parametrize(('mean', 'var'), PAIRS)
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('shape', [(4, CHANNELS), (3, CHANNELS, 1, 1), (2, CHANNELS, 5, 7)])
def test_equals_the_formulas(mean, var, correction, shape):
    layer = layer_of(mean, var, correction=correction).double()
    x = torch.randn(shape, dtype=torch.float64) + 3
    found = {}
    for training in (False, True):
        layer.train(training)
        leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
        before = copy.deepcopy(layer.state_dict())
        expected = formula(layer, twin, running=not training)
        y = layer(leaf)
        upstream = torch.randn_like(y)
        y.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-9, atol=1e-9)
        found[training] = before
    for name, value in layer.state_dict().items():
        changed = not torch.equal(value, found[True][name])
        assert changed == name.startswith(('running', 'num_batches'))


@EXPORT
@pytest.mark.parametrize(('mean', 'var'), [('LN', 'BN'), ('IN', 'LN'), ('GN', 'GN'), ('BN', 'IN')])
@pytest.mark.parametrize('correction', [0, 1])
def test_a_traced_layer_holds_for_every_size(mean, var, correction):
    layer = layer_of(mean, var, correction=correction).eval()
    traced = torch.jit.trace(layer, torch.randn(2, CHANNELS, 5, 7), check_trace=False)
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(
        layer, (torch.randn(2, CHANNELS, 5, 7),), dynamic_shapes=(sizes,)
    ).module()
    for shape in ((2, CHANNELS, 5, 7), (3, CHANNELS, 8, 4)):
        x = torch.randn(shape)
        for recorded in (traced, exported):
            torch.testing.assert_close(recorded(x), layer(x), rtol=1e-5, atol=1e-5)


@ONE_GRAPH
@pytest.mark.parametrize('needs_dx', [False, True])
def test_a_compiled_layer_is_plain_operators_in_evaluation(needs_dx):
    torch.compiler.reset()
    layer = layer_of('LN', 'BN').eval()
    x = torch.randn(2, CHANNELS, 5, 7, requires_grad=needs_dx)
    graphs = []

    def note(graph, example):
        graphs.append(graph)
        return graph

    y = torch.compile(layer, backend=note, fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == 'call_function']
    assert called
    assert not [each for each in called if isinstance(each, torch._ops.HigherOrderOperator)]


class Operators(TorchDispatchMode):
    """Notes the sizes that operators read."""

    def __init__(self) -> None:
        super().__init__()
        self.large = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(isinstance(a, torch.Tensor) and a.numel() > 1000 for a in args):
            self.large.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_only_what_it_needs_is_computed():
    x = torch.randn(2, CHANNELS, 96, 96)
    passes = {}
    for pair in [('BN', 'BN'), ('LN', 'BN'), ('BN', 'LN')]:
        layer = layer_of(*pair).eval()
        with Operators() as seen:
            layer(x)
        passes[pair] = [n for n in seen.large if n not in ('aten::view', 'aten::_unsafe_view')]
    assert passes['BN', 'BN'] == ['aten::native_batch_norm']
    # Of rows the means alone, or both moments in one pass; then one affine pass.
    assert passes['LN', 'BN'] == ['aten::mean', 'aten::native_batch_norm']
    assert passes['BN', 'LN'][0] == 'aten::native_group_norm'
    assert len(passes['BN', 'LN']) == 3, passes


def test_cumulative_average():
    layer = SelectedNorm(CHANNELS, 'LN', 'BN', momentum=None)
    batches = [torch.randn(4, CHANNELS, 5, 5) for _ in range(3)]
    for x in batches:
        layer(x)
    mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-6)
    assert int(layer.num_batches_tracked) == 3


def test_without_batch_norm_nothing_is_tracked():
    layer = SelectedNorm(CHANNELS, 'LN', 'IN', affine=False)
    assert not layer.state_dict()
    assert 'LN' in repr(layer)
    assert 'num_groups=3' in repr(layer_of('GN', 'IN'))


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ((6, 'XN', 'BN'), "mean_source: got 'XN', expected one of IN, LN, BN, GN"),
        ((6, 'LN', None), 'var_source: got None, expected one of'),
        ((0, 'LN', 'BN'), 'num_features: got 0, expected a positive integer'),
        ((6.0, 'LN', 'BN'), 'num_features: got 6.0, expected a positive integer'),
        ((6, 'LN', 'BN', -1), 'eps: got -1, expected a number of at least 0'),
        ((6, 'LN', 'BN', 1e-5, 2), r'momentum: got 2, expected None or a number in \[0, 1\]'),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        SelectedNorm(*arguments)


def test_bad_input():
    for correction in (2, 1.0, '1'):
        with pytest.raises(ValueError, match=f'correction: got {correction!r}, expected 0 or 1'):
            SelectedNorm(6, 'LN', 'BN', correction=correction)
    for num_groups in ('a', 2.0, 0, True):
        with pytest.raises(ValueError, match=f'num_groups: got {num_groups!r}, expected a pos'):
            SelectedNorm(6, 'GN', 'BN', num_groups=num_groups)
    with pytest.raises(ValueError, match=r'x: got torch.int64, expected a floating-point tensor'):
        SelectedNorm(6, 'LN', 'BN')(torch.ones(2, 6, 3, 3, dtype=torch.int64))
    for shape in ((6,), (2, 5, 3, 3)):
        with pytest.raises(ValueError, match='x: got'):
            SelectedNorm(6, 'LN', 'BN')(torch.randn(shape))
