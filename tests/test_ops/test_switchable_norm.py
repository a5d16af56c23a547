"""The fused normalisation: forward and every gradient against the literal formulas."""

import itertools

import pytest
import torch
from since import AUTOCAST_DTYPES, ONE_GRAPH
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssn_plugin import sparsestmax, switchable_norm
from ssn_plugin.ops import reference
from ssn_plugin.ops.switchable_norm import aten
from ssn_plugin.ops.switchable_norm.statistics import NORMALIZERS

THREE = ('IN', 'LN', 'BN')
SUBSETS = [subset for count in (2, 3, 4) for subset in itertools.combinations(NORMALIZERS, count)]
GROUPS = 2
# Each shape with what it is there for.
SHAPES = {
    'usual': (4, 6, 8, 8),
    'odd sizes': (3, 6, 7, 5),
    'one sample': (1, 6, 8, 8),
    'one position, as a pooled branch has': (4, 6, 1, 1),
    'one sample and one position': (1, 6, 1, 1),
    'one row of positions': (2, 6, 1, 9),
    'one channel per group': (3, 2, 5, 5),
    'vectors': (5, 6),
    'one vector': (1, 6),
    'sequences': (3, 6, 11),
    'volumes': (2, 6, 3, 5, 2),
    'more channels than positions': (2, 130, 2, 2),
    'more positions than a vector register or block': (1, 2, 67, 33),
}
NAMES = ('y', 'dx', 'dmean_ratios', 'dvar_ratios', 'dweight', 'dbias')


def ratios(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, count, dtype=torch.float64).softmax(-1))


def inputs(shape, normalizers=THREE, mean=1.0, std=2.0) -> tuple[torch.Tensor, ...]:
    """x, both ratio vectors, weight and bias, in float64."""
    channels = shape[1]
    offset = torch.randn(channels, dtype=torch.float64).reshape(1, -1, *[1] * (len(shape) - 2))
    x = torch.randn(shape, dtype=torch.float64) * std + mean * (1 + offset)
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    return x, *ratios(len(normalizers)), weight, bias


def results(function, arguments, upstream, **settings) -> dict[str, torch.Tensor]:
    """Y and the gradient of every argument under a given upstream gradient."""
    leaves = [
        None if argument is None else argument.detach().requires_grad_() for argument in arguments
    ]
    y = function(*leaves, **settings)
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(y, given, upstream.to(y.dtype)))
    found = [None if leaf is None else next(gradients) for leaf in leaves]
    return dict(zip(NAMES, (y, *found), strict=True))


def assert_equals_reference(arguments, rtol=1e-7, atol=1e-9, running=(None, None), **settings):
    """Compare with the formulas in float64; ``running`` are the statistics of 'BN' if given."""
    upstream = torch.randn_like(arguments[0])
    exact = [None if argument is None else argument.double() for argument in arguments]
    expected = results(
        lambda *leaves: reference.switchable_norm(
            *leaves, running_mean=running[0], running_var=running[1], **settings
        ),
        exact,
        upstream.double(),
    )
    found = results(
        lambda *leaves: switchable_norm(*leaves, *running, training=running[0] is None, **settings),
        arguments,
        upstream,
    )
    for name in NAMES:
        if expected[name] is None:
            continue
        torch.testing.assert_close(
            found[name].double(),
            expected[name],
            rtol=rtol,
            # Sums over many elements are compared in units of their own size.
            atol=atol * max(1, expected[name].abs().max().item()),
            msg=lambda message, name=name: f'{name}: {message}',
        )
    return found


@pytest.fixture(params=['small', 'large', 'large, with little kept'])
def size_class(request, monkeypatch):
    """Makes small inputs go the ways of large ones."""
    if request.param != 'small':
        monkeypatch.setattr(aten, '_MANY', 0)
    if 'little' in request.param:
        monkeypatch.setattr(aten, '_SMALL', 0)
    return request.param


@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures('size_class')
def test_shapes(shape, correction):
    arguments = inputs(shape, NORMALIZERS)
    assert_equals_reference(
        arguments, normalizers=NORMALIZERS, num_groups=GROUPS, correction=correction
    )


@pytest.mark.parametrize('running', [False, True], ids=['batch', 'running'])
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('normalizers', SUBSETS, ids='-'.join)
@pytest.mark.usefixtures('size_class')
def test_normalizers(normalizers, correction, running):
    arguments = inputs((3, 6, 5, 4), normalizers)
    statistics = (None, None)
    if running:
        statistics = torch.randn(2, 6, dtype=torch.float64).square()
    assert_equals_reference(
        arguments,
        running=statistics,
        normalizers=normalizers,
        num_groups=GROUPS,
        correction=correction,
    )


def test_order_of_normalizers_is_the_order_of_ratios():
    x, p, q, weight, bias = inputs((3, 6, 5, 4))
    y = switchable_norm(x, p, q, weight, bias, normalizers=THREE)
    flipped = switchable_norm(x, p.flip(0), q.flip(0), weight, bias, normalizers=THREE[::-1])
    torch.testing.assert_close(flipped, y)


@pytest.mark.parametrize('given', [(True, False), (False, True), (False, False)])
@pytest.mark.usefixtures('size_class')
def test_without_weight_or_bias(given):
    x, p, q, *affine = inputs((3, 6, 5, 4))
    affine = [vector if keep else None for vector, keep in zip(affine, given, strict=True)]
    assert_equals_reference((x, p, q, *affine))


@pytest.mark.parametrize('wanted', range(5), ids=NAMES[1:])
@pytest.mark.usefixtures('size_class')
def test_gradient_of_one_argument_alone(wanted):
    arguments = inputs((3, 6, 5, 4))
    upstream = torch.randn_like(arguments[0])
    expected = results(switchable_norm, arguments, upstream)[NAMES[1 + wanted]]
    arguments[wanted].requires_grad_()
    (found,) = torch.autograd.grad(switchable_norm(*arguments), arguments[wanted], upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('eps', [0.0, 1e-5, 0.1])
def test_eps(eps):
    assert_equals_reference(inputs((3, 6, 5, 4)), eps=eps)


def test_gradcheck():
    arguments = [a.requires_grad_() for a in inputs((2, 4, 3, 2), NORMALIZERS)]
    assert torch.autograd.gradcheck(
        lambda *a: switchable_norm(*a, normalizers=NORMALIZERS, num_groups=GROUPS), arguments
    )


# Memory layouts

LAYOUTS = {
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'every other position': lambda x: x.repeat_interleave(2, 3)[..., ::2],
    'part of the channels': lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    'channels_last, part of the channels': lambda x: torch.cat((x, x), 1).contiguous(
        memory_format=torch.channels_last
    )[:, : x.shape[1]],
    'expanded over samples': lambda x: x[:1].expand_as(x),
    'expanded over positions': lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.usefixtures('size_class')
def test_layouts(layout, correction):
    x, *others = inputs((3, 6, 5, 4))
    assert_equals_reference((layout(x), *others), correction=correction)


@pytest.mark.parametrize('layout', ['contiguous', *list(LAYOUTS)[:3]])
@pytest.mark.usefixtures('size_class')
def test_layout_of_the_upstream_gradient_does_not_matter(layout):
    arguments = inputs((3, 6, 5, 4))
    upstream = torch.randn_like(arguments[0])
    expected = results(switchable_norm, arguments, upstream)
    laid_out = upstream if layout == 'contiguous' else LAYOUTS[layout](upstream)
    channels_last = (LAYOUTS['channels_last'](arguments[0]), *arguments[1:])
    for given in (arguments, channels_last):
        torch.testing.assert_close(results(switchable_norm, given, laid_out), expected)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('shape', [(3, 6, 5, 4), (3, 1, 5, 4), (3, 6, 1, 1), (1, 6, 5, 4)])
def test_memory_format_is_that_of_batch_norm(shape, memory_format):
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    p = torch.full((3,), 1 / 3)
    expected = nn.BatchNorm2d(shape[1])(x)
    y = switchable_norm(x, p, p)
    assert y.stride() == expected.stride()
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ('dims', 'memory_format'), [(4, torch.channels_last), (5, torch.channels_last_3d)]
)
@pytest.mark.usefixtures('size_class')
def test_channels_last_goes_in_and_out_in_both_directions(dims, memory_format):
    arguments = inputs((2, 6, 3, 5, 4)[:dims])
    upstream = torch.randn_like(arguments[0]).contiguous(memory_format=memory_format)
    arguments = (arguments[0].contiguous(memory_format=memory_format), *arguments[1:])
    found = results(switchable_norm, arguments, upstream)
    assert found['y'].is_contiguous(memory_format=memory_format)
    assert found['dx'].is_contiguous(memory_format=memory_format)
    assert_equals_reference(arguments)


@pytest.mark.parametrize('eval_mode', [False, True], ids=['train', 'eval'])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', [(3, 6, 5, 4), (3, 6, 1, 1), (3, 6)], ids=str)
@pytest.mark.parametrize('one_hot', [False, True])
@pytest.mark.usefixtures('size_class')
def test_in_place_activation_may_follow(shape, channels_last, eval_mode, one_hot):
    # As in every ResNet: y must not be needed by the backward, nor be a view.
    x, *rest = inputs(shape)
    if channels_last and len(shape) == 4:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    if one_hot:
        rest[:2] = (torch.tensor([0.0, 0.0, 1.0], dtype=x.dtype, requires_grad=True),) * 2
    running = (torch.zeros(6, dtype=x.dtype), torch.ones(6, dtype=x.dtype))
    upstream = torch.randn_like(x)
    found, expected = (
        results(
            lambda *a, f=activation: f(switchable_norm(*a, *running, training=not eval_mode)),
            (x, *rest),
            upstream,
        )
        for activation in (torch.relu_, torch.relu)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures('size_class')
def test_input_is_not_modified():
    arguments = inputs((3, 6, 5, 4))
    before = [argument.clone() for argument in arguments]
    results(switchable_norm, arguments, torch.randn_like(arguments[0]))
    assert all(map(torch.equal, arguments, before))


# Precision

# Per dtype: unit roundoff of the result times a small factor.
PRECISION = {
    torch.float64: (1e-7, 1e-9),
    torch.float32: (1e-4, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


@pytest.mark.parametrize('dtype', PRECISION, ids=str)
def test_dtypes(dtype):
    arguments = [argument.to(dtype) for argument in inputs((4, 6, 8, 8))]
    rtol, atol = PRECISION[dtype]
    found = assert_equals_reference(arguments, rtol=rtol, atol=atol)
    assert all(value.dtype == dtype for value in found.values())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_input_with_float32_parameters(dtype):
    x, *others = inputs((4, 6, 8, 8))
    rtol, atol = PRECISION[dtype]
    arguments = (x.to(dtype), *(other.float() for other in others))
    found = assert_equals_reference(arguments, rtol=rtol, atol=atol)
    assert found['y'].dtype == found['dx'].dtype == dtype
    assert all(found[name].dtype == torch.float32 for name in NAMES[2:])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures('size_class')
def test_half_precision_is_computed_in_float32(dtype):
    # The only rounding is that of x, y and dx: the rest is what float32 gives.
    x, *others = (argument.float() for argument in inputs((4, 6, 8, 8)))
    upstream = torch.randn_like(x).to(dtype)
    narrow = results(switchable_norm, (x.to(dtype), *others), upstream)
    wide = results(switchable_norm, (x.to(dtype).float(), *others), upstream.float())
    for name in NAMES:
        torch.testing.assert_close(narrow[name], wide[name].to(narrow[name].dtype), rtol=0, atol=0)


def test_large_float16_values_do_not_overflow():
    x = (torch.randn(2, 4, 8, 8) * 2e4).clamp(-6e4, 6e4).half()
    p = torch.full((3,), 1 / 3)
    y = switchable_norm(x, p, p)
    torch.testing.assert_close(
        y.double(),
        reference.switchable_norm(x.double(), p.double(), p.double()),
        rtol=2e-3,
        atol=2e-3,
    )


@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
def test_autocast_changes_nothing(dtype):
    # Statistics stay in float32, whatever autocast would like to do to their products.
    for x in (torch.randn(3, 6, 5, 4), torch.randn(3, 6, 5, 4).to(dtype)):
        arguments = (x, *(argument.float() for argument in inputs((3, 6, 5, 4))[1:]))
        upstream = torch.randn_like(x)
        expected = results(switchable_norm, arguments, upstream)
        with torch.autocast('cpu', dtype=dtype):
            found = results(switchable_norm, arguments, upstream)
        for name in NAMES:
            assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('mean', [1e2, 1e3, 1e4])
@pytest.mark.parametrize('only', [*THREE, None])
@pytest.mark.usefixtures('size_class')
def test_large_mean_with_small_variance(only, mean, layout):
    # x itself is exact in float32; computing with it costs digits in proportion to mean / std, as
    # it does in ATen's BatchNorm, and never in proportion to its square.
    x, p, q, weight, bias = inputs((2, 6, 40, 40), mean=0, std=1.0)
    x = (x + mean).float()
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    if only is not None:
        p = q = torch.tensor([float(name == only) for name in THREE], dtype=torch.float64)
    arguments = (x, *(argument.float() for argument in (p, q, weight, bias)))
    upstream = torch.randn_like(x)
    found = results(switchable_norm, arguments, upstream)
    expected = results(
        reference.switchable_norm, [a.double() for a in arguments], upstream.double()
    )
    digits = mean * torch.finfo(torch.float32).eps
    for name, factor in {'y': 2, 'dx': 2, 'dweight': 4, 'dbias': 1}.items():
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < factor * digits, name


def test_constant_rows():
    x = torch.full((2, 4, 5, 5), 0.1)
    x[:, 2] = 7
    arguments = (x, *(argument.float() for argument in inputs((2, 4, 5, 5))[1:]))
    assert_equals_reference(arguments, rtol=1e-3, atol=1e-3)
    only_in = torch.tensor([1.0, 0, 0])
    assert switchable_norm(x, only_in, only_in).abs().max() < 1e-2


@pytest.mark.parametrize(
    'shape', [(4, 6, 1, 1), (1, 6, 1, 1), (4, 6), (1, 6), (1, 1), (1, 1, 1, 1)]
)
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('only', THREE)
def test_one_position_is_never_nan(only, correction, shape):
    p = torch.tensor([float(name == only) for name in THREE])
    x, _, _, weight, bias = (argument.float() for argument in inputs(shape))
    found = results(
        lambda *a: switchable_norm(*a, correction=correction),
        (x, p, p, weight, bias),
        torch.randn(shape),
    )
    assert all(value.isfinite().all() for value in found.values())


# What is kept, and what is read on the host


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_only_x_is_kept_at_full_size(dtype):
    x = torch.randn(3, 6, 20, 20).to(dtype).requires_grad_()
    p = torch.full((3,), 1 / 3, requires_grad=True)
    weight, bias = torch.ones(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        switchable_norm(x, p, p, weight, bias)
    full = [tensor for tensor in kept if tensor.numel() > 3 * 6]
    assert [tensor.data_ptr() for tensor in full] == [x.data_ptr()]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('correction', [0, 1])
def test_no_value_is_read_on_the_host(correction, training):
    with FakeTensorMode():
        arguments = [a.requires_grad_() for a in inputs((3, 6, 5, 4))]
        running = (torch.zeros(6), torch.ones(6))
        y = switchable_norm(*arguments, *running, training=training, correction=correction)
        y.backward(torch.randn_like(y))
        assert all(a.grad.shape == a.shape for a in arguments)


# ATen operators that torch.use_deterministic_algorithms(True) refuses on a GPU, as mmengine's
# randomness=dict(deterministic=True) asks for: those that could serve here.
NOT_DETERMINISTIC = {
    'cumsum', 'histc', 'bincount', 'kthvalue', 'median', 'scatter_add', 'scatter_reduce', 'put_',
}  # fmt: skip


class RecordOperators(TorchDispatchMode):
    """Collects the names of the ATen operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.split('.')[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_nothing_is_refused_where_determinism_is_asked_for(memory_format):
    z = torch.randn(2, 3, requires_grad=True)
    x = torch.randn(3, 6, 5, 4).contiguous(memory_format=memory_format).requires_grad_()
    with RecordOperators() as record:
        y = switchable_norm(x, *sparsestmax(z, 0.4).unbind(), normalizers=THREE)
        y.backward(torch.randn_like(y))
    assert {'gather', 'addcmul_'} <= record.names  # it records
    assert not record.names & NOT_DETERMINISTIC


@ONE_GRAPH
def test_traces_as_one_graph():
    arguments = inputs((3, 6, 5, 4))
    upstream = torch.randn_like(arguments[0])
    compiled = torch.compile(switchable_norm, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(
        results(compiled, arguments, upstream), results(switchable_norm, arguments, upstream)
    )


def test_shapes_are_known_on_the_meta_device():
    # As with nn.BatchNorm2d: tools that count parameters or shapes build models there.
    x, p = torch.empty(3, 6, 5, 4, device='meta'), torch.empty(3, device='meta')
    assert switchable_norm(x, p, p).shape == x.shape


@pytest.mark.parametrize('running', [False, True])
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('shape', [(3, 6), (2, 6, 3), (2, 6, 2, 3)], ids=str)
def test_second_derivatives(shape, correction, running):
    x, p, q, weight, bias = (a.double().detach() for a in inputs(shape))
    statistics = (torch.randn(6).double(), torch.rand(6).double() + 0.5) if running else ()
    inputs_ = [a.requires_grad_() for a in (x, p, q, weight, bias)]

    def layer(*tensors):
        return switchable_norm(*tensors, *statistics, training=not running, correction=correction)

    assert torch.autograd.gradgradcheck(layer, inputs_)


@pytest.mark.parametrize('normalizer', NORMALIZERS)
@pytest.mark.parametrize('correction', [0, 1])
def test_reference_statistics(normalizer, correction):
    # The yardstick itself, against torch where torch has the statistic.
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64) + 3
    mean, var = reference.normalizer_statistics(x, normalizer, GROUPS, correction)
    dims = {'IN': (2, 3), 'LN': (1, 2, 3), 'BN': (0, 2, 3), 'GN': (2, 3, 4)}[normalizer]
    split = x.reshape(3, GROUPS, 3, 5, 4) if normalizer == 'GN' else x
    expected = split.mean(dims, keepdim=True).expand_as(split).reshape(x.shape)[..., 0, 0]
    torch.testing.assert_close(mean, expected)
    if correction == 0 or normalizer == 'IN':
        expected = split.var(dims, correction=correction, keepdim=True)
    else:
        second = x.var((2, 3)) + x.mean((2, 3)) ** 2
        second = second.reshape(split.shape[:-2])[..., None, None]
        pooled = [d for d in dims if d < split.dim() - 2]
        expected = second.mean(pooled, keepdim=True) - split.mean(dims, keepdim=True) ** 2
    torch.testing.assert_close(var, expected.expand_as(split).reshape(x.shape)[..., 0, 0])


def test_reference_rejects_unknown_names():
    with pytest.raises(ValueError, match="normalizer: got 'XN'"):
        reference.normalizer_statistics(torch.randn(2, 3), 'XN')
