"""SSN: equal to the normalizer it selects, to the paper's formulas, and strict about its input."""

import copy
import math
import warnings

import pytest
import torch
from since import AUTOCAST_DTYPES, ONE_GRAPH
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssn_plugin import SN, SSN, SSN1d, SSN2d, SSN3d, SyncSSN, collapse_ssn, set_radius
from ssn_plugin.ops import reference

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
CHANNELS, GROUPS = 6, 3
SHAPE = (4, CHANNELS, 5, 7)
LAYERS = (SSN, SSN1d, SSN2d, SSN3d, SN)


def torch_layer(normalizer: str, momentum: float | None = 0.1, dims: int = 4) -> nn.Module:
    """torch's own layer of that name."""
    instance = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    batch = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    return {
        'IN': lambda: instance[dims](CHANNELS, affine=True),
        'LN': lambda: nn.GroupNorm(1, CHANNELS),
        'BN': lambda: batch[dims](CHANNELS, momentum=momentum),
        'GN': lambda: nn.GroupNorm(GROUPS, CHANNELS),
    }[normalizer]()


def one_hot_layer(normalizer: str, momentum: float | None = 0.1, **settings) -> SSN:
    """An SSN that ``set_radius`` made one-hot on a normalizer."""
    layer = SSN(CHANNELS, momentum=momentum, normalizers=NORMALIZERS, num_groups=GROUPS, **settings)
    with torch.no_grad():
        for parameter in (layer.mean_weight, layer.var_weight):
            parameter[NORMALIZERS.index(normalizer)] = 0.1
    set_radius(layer, 1.0)
    assert layer.selected == (normalizer, normalizer)
    return layer


def share_affine(layer: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for name in ('weight', 'bias'):
            getattr(layer, name).normal_()
            getattr(other, name).copy_(getattr(layer, name))


def outputs(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(upstream)
    return dict(y=y.detach(), dx=x.grad, dweight=layer.weight.grad, dbias=layer.bias.grad)


# One-hot is the normalizer


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('normalizer', NORMALIZERS)
def test_one_hot_is_that_normalizer_in_training_and_evaluation(normalizer, dtype, memory_format):
    layer, expected = one_hot_layer(normalizer).to(dtype), torch_layer(normalizer).to(dtype)
    share_affine(layer, expected)
    for step in range(4):
        x = (torch.randn(SHAPE, dtype=dtype) * 2 + step).contiguous(memory_format=memory_format)
        upstream = torch.randn_like(x)
        for training in (True, False):
            found = outputs(layer.train(training), x, upstream)
            theirs = outputs(expected.train(training), x, upstream)
            torch.testing.assert_close(found, theirs, rtol=1e-4, atol=2e-5)
            assert found['y'].is_contiguous(memory_format=memory_format)
            if normalizer == 'BN':
                assert found['y'].stride() == theirs['y'].stride()
        # Their gradient is zero rather than None, or DistributedDataParallel would wait for it.
        assert layer.mean_weight.grad.tolist() == layer.var_weight.grad.tolist() == [0] * 4


@pytest.mark.parametrize('shape', [(4, CHANNELS), (4, CHANNELS, 9), (2, CHANNELS, 3, 4, 5)])
@pytest.mark.parametrize('normalizer', NORMALIZERS)
def test_one_hot_is_that_normalizer_in_other_dimensions(normalizer, shape):
    if normalizer == 'IN' and len(shape) == 2:
        x = torch.randn(shape)
        assert torch.equal(one_hot_layer('IN')(x), torch.zeros(shape))  # nn has no such layer
        return
    layer, expected = one_hot_layer(normalizer), torch_layer(normalizer, dims=len(shape))
    share_affine(layer, expected)
    x, upstream = torch.randn(2, *shape)
    for training in (True, False):
        torch.testing.assert_close(
            outputs(layer.train(training), x, upstream),
            outputs(expected.train(training), x, upstream),
            rtol=1e-4,
            atol=2e-5,
        )


def test_one_hot_by_radius_alone_is_the_normalizer_too():
    layer, expected = SSN(CHANNELS, radius=1.0), nn.BatchNorm2d(CHANNELS)  # a tie: the last, BN
    x, upstream = torch.randn(2, *SHAPE)
    torch.testing.assert_close(
        outputs(layer, x, upstream), outputs(expected, x, upstream), rtol=1e-4, atol=2e-5
    )
    assert layer.mean_fixed == 0


@pytest.mark.parametrize('track_running_stats', [True, False])
@pytest.mark.parametrize('affine', [True, False])
def test_variants_of_batch_norm(affine, track_running_stats):
    settings = dict(affine=affine, track_running_stats=track_running_stats, eps=1e-3)
    layer, expected = SSN(CHANNELS, **settings), nn.BatchNorm2d(CHANNELS, **settings)
    set_radius(layer, 1.0)
    own = set(layer.state_dict()) - {'radius'}
    assert {n for n in own if not n.startswith(('mean_', 'var_'))} == set(expected.state_dict())
    for _ in range(2):
        x = torch.randn(SHAPE) + 1
        for training in (True, False):
            torch.testing.assert_close(
                layer.train(training)(x), expected.train(training)(x), rtol=1e-4, atol=2e-5
            )


# Running statistics


@pytest.mark.parametrize('radius', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('momentum', [0.1, 0.003, 1.0, None])
def test_running_statistics_are_those_of_batch_norm(momentum, radius):
    layer, expected = SSN(CHANNELS, momentum=momentum), nn.BatchNorm2d(CHANNELS, momentum=momentum)
    set_radius(layer, radius)
    for name, value in expected.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), value)  # the initial ones
    for step in range(5):
        x = torch.randn(SHAPE) * (step + 1) + step
        layer(x), expected(x)
        layer.eval()(x), layer.train()  # evaluation leaves them alone
        for name, value in expected.named_buffers():
            torch.testing.assert_close(
                layer.get_buffer(name), value, msg=lambda m, n=name: f'{n} {m}'
            )


@pytest.mark.parametrize('momentum', [0.1, None])
def test_correction_reproduces_the_variances_of_the_release(momentum):
    layer = SSN(CHANNELS, momentum=momentum, correction=1).double()
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.3, 0.2, -0.1]))
        layer.var_weight.copy_(torch.tensor([0.1, -0.2, 0.2]))
    p, q = layer.mean_ratios, layer.var_ratios
    assert (p > 0).all()
    assert (q > 0).all()
    running_mean, running_var = torch.zeros(6).double(), torch.ones(6).double()
    for step in range(1, 4):
        x = torch.randn(SHAPE, dtype=torch.float64) * 2 + 1
        # The formulas of the release, with its E[x^2] - E[x]^2.
        mean_in, var_in = x.mean((2, 3)), x.var((2, 3))
        square = var_in + mean_in**2
        mean_ln, mean_bn = mean_in.mean(1, keepdim=True), mean_in.mean(0)
        var_ln = square.mean(1, keepdim=True) - mean_ln**2
        var_bn = square.mean(0) - mean_bn**2
        mean = p[0] * mean_in + p[1] * mean_ln + p[2] * mean_bn
        var = q[0] * var_in + q[1] * var_ln + q[2] * var_bn
        expected = (x - mean[..., None, None]) / (var[..., None, None] + 1e-5).sqrt()
        torch.testing.assert_close(layer(x), expected)
        weight = 1 / step if momentum is None else momentum
        running_mean = (1 - weight) * running_mean + weight * mean_bn
        running_var = (1 - weight) * running_var + weight * var_bn
        torch.testing.assert_close(layer.running_mean, running_mean)
        torch.testing.assert_close(layer.running_var, running_var)


def test_correction_matters():
    x = torch.randn(2, CHANNELS, 2, 2)
    layers = [SSN(CHANNELS, correction=correction) for correction in (0, 1)]
    assert (layers[0](x) - layers[1](x)).abs().max() > 0.01
    assert (layers[0].running_var - layers[1].running_var).abs().max() > 1e-4


# Against the formulas, control parameters included


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('radius', [0.0, 0.3, 0.6])
def test_layer_equals_the_formulas(radius, correction, training):
    layer = SSN(
        CHANNELS,
        normalizers=NORMALIZERS,
        num_groups=GROUPS,
        correction=correction,
        radius=radius,
        eps=1e-3,
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        # On the largest of these circles three ratios remain, which can still move.
        layer.mean_weight.copy_(torch.tensor([0.05, 0.012, -0.2, 0.01]))
        layer.var_weight.copy_(torch.tensor([0.012, 0.01, 0.05, -0.2]))
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    layer.train(training)
    running = (None, None)
    if not training:
        running = (layer.running_mean, layer.running_var)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    inputs = (x, layer.mean_weight, layer.var_weight, layer.weight, layer.bias)
    y = reference.switchable_norm(
        x,
        reference.sparsestmax(layer.mean_weight, radius),
        reference.sparsestmax(layer.var_weight, radius),
        layer.weight,
        layer.bias,
        NORMALIZERS,
        GROUPS,
        correction,
        layer.eps,
        *running,
    )
    expected = torch.autograd.grad(y, inputs, upstream)
    found_y = layer(x)
    torch.testing.assert_close(found_y, y, rtol=1e-6, atol=1e-6)  # the radius is a float32 buffer
    found = torch.autograd.grad(found_y, inputs, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected[1].abs().max() > 1e-3  # the control parameters do something


def test_mean_and_variance_have_ratios_of_their_own():
    layer = SSN(CHANNELS)
    with torch.no_grad():
        layer.mean_weight[0] = layer.var_weight[1] = 0.1
    set_radius(layer, 1.0)
    assert layer.selected == ('IN', 'LN')
    x = torch.randn(SHAPE)
    mean = x.mean((2, 3), keepdim=True)
    std = (x.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), (x - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'shape', [(3, CHANNELS, 1, 1), (1, CHANNELS, 1, 1), (1, CHANNELS), (1, 6, 1)]
)
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('radius', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('preferred', range(4))
def test_spatial_size_of_one_is_never_nan(shape, correction, radius, preferred):
    names = NORMALIZERS if len(shape) > 2 else ('LN', 'BN', 'GN')
    layer = SSN(CHANNELS, normalizers=names, num_groups=GROUPS, correction=correction)
    with torch.no_grad():
        layer.mean_weight[preferred % len(names)] = layer.var_weight[preferred % len(names)] = 0.1
    set_radius(layer, radius)
    x = torch.randn(shape, requires_grad=True)
    for _ in range(2):
        y = layer(x)
        y.backward(torch.randn(shape))
        assert y.isfinite().all()
        assert x.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
        assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert layer.eval()(x).isfinite().all()


# Empty batches


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape', [(0, CHANNELS, 7, 7), (0, CHANNELS), (0, CHANNELS, 5)])
def test_empty_batch_is_treated_as_batch_norm_treats_it(shape, training, frozen):
    layer = SSN(CHANNELS, normalizers=('IN', 'LN', 'BN')[len(shape) == 2 :])
    expected = torch_layer('BN', dims=len(shape))
    set_radius(layer, 1.0 if frozen else 0.4)
    for module in (layer, expected):
        module.train(training)
    x, other = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    y, theirs = layer(x), expected(other)
    assert y.shape == theirs.shape
    assert y.dtype == theirs.dtype
    assert y.requires_grad == theirs.requires_grad
    y.sum().backward()
    theirs.sum().backward()
    assert x.grad.shape == other.grad.shape
    for name, parameter in layer.named_parameters():
        assert (parameter.grad == 0).all(), name
        assert parameter.grad.shape == parameter.shape
    for name, buffer in expected.named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer), name


# What is said of wrong input


@pytest.mark.parametrize(
    ('layer', 'accepted'),
    list(zip(LAYERS, [(2, 3, 4, 5), (2, 3), (4,), (5,), (2, 3, 4, 5)], strict=True)),
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_dimensions(layer, accepted):
    shape = (3, 4, 5, 2, 2, 2)
    for dims in range(1, 7):
        x = torch.randn(shape[:dims])
        if dims in accepted:
            assert layer(4).eval()(x).shape == x.shape
            continue
        with pytest.raises(ValueError, match=r'x: got shape .*, expected .*-D') as caught:
            layer(4)(x)
        assert str(tuple(x.shape)) in str(caught.value)
        assert all(f'{number}-D' in str(caught.value) for number in accepted)


@pytest.mark.parametrize('layer', [SSN, SN])
def test_integers(layer):
    with pytest.raises(ValueError, match=r'x: got torch\.int64, expected a floating-point tensor'):
        layer(4)(torch.ones(2, 4, 3, 3, dtype=torch.int64))


@pytest.mark.parametrize('layer', [SSN, SN])
@pytest.mark.parametrize('shape', [(2, 5, 4, 4), (0, 5, 4, 4), (2, 1)])
def test_wrong_number_of_channels(layer, shape):
    with pytest.raises(ValueError, match=rf'x: got {shape[1]} channels.*expected num_features=4'):
        layer(4)(torch.randn(shape))


BAD_ARGUMENTS = {
    'no channel': (dict(num_features=0), ('num_features:', '0', 'positive')),
    'half a channel': (dict(num_features=8.5), ('num_features:', '8.5', 'positive integer')),
    'negative eps': (dict(eps=-1e-5), ('eps:', '-1e-05', 'at least 0')),
    'eps of NaN': (dict(eps=math.nan), ('eps:', 'nan', 'at least 0')),
    'momentum above one': (dict(momentum=1.5), ('momentum:', '1.5', '[0, 1]')),
    'negative momentum': (dict(momentum=-0.1), ('momentum:', '-0.1', '[0, 1]')),
    'momentum of NaN': (dict(momentum=math.nan), ('momentum:', 'nan', '[0, 1]')),
    'unknown name': (dict(normalizers=('IN', 'bn')), ('normalizers:', "'bn'", 'IN, LN, BN, GN')),
    'one name': (dict(normalizers=('BN',)), ('normalizers:', "('BN',)", 'at least 2')),
    'no name': (dict(normalizers=()), ('normalizers:', '()', 'at least 2')),
    'a name twice': (dict(normalizers=('BN', 'BN')), ('normalizers:', "('BN', 'BN')", 'different')),
    'a string': (dict(normalizers='BN'), ('normalizers:', "'BN'", 'names')),
    'no group': (dict(normalizers=('BN', 'GN'), num_groups=0), ('num_groups:', '0', 'positive')),
    'half a group': (dict(num_groups=2.5), ('num_groups:', '2.5', 'positive integer')),
    'correction': (dict(correction=2), ('correction:', '2', '0 or 1')),
    'correction between': (dict(correction=0.5), ('correction:', '0.5', '0 or 1')),
}
BAD_RADIUS = {
    'negative radius': (dict(radius=-0.1), ('radius:', '-0.1', 'at least 0')),
    'radius of NaN': (dict(radius=math.nan), ('radius:', 'nan', 'at least 0')),
    'radius in words': (dict(radius='large'), ('radius:', "'large'", 'at least 0')),
}
BAD = [(SSN, *case) for case in (BAD_ARGUMENTS | BAD_RADIUS).items()]
BAD += [(SN, *case) for case in BAD_ARGUMENTS.items()]


@pytest.mark.parametrize(
    ('layer', 'given', 'said'),
    [pytest.param(layer, *case, id=f'{layer.__name__} {name}') for layer, name, case in BAD],
)
def test_bad_argument_is_named_with_its_value_and_what_was_expected(layer, given, said):
    with pytest.raises(ValueError, match=r'got .*, expected') as caught:
        layer(**(dict(num_features=8) | given))
    assert all(part in str(caught.value) for part in said)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('layer', LAYERS)
def test_misspelt_keyword_is_an_error(layer):
    with pytest.raises(TypeError, match='moment'):
        layer(8, moment=0.1)


def test_sn_has_no_radius():
    with pytest.raises(TypeError, match='radius'):
        SN(8, radius=0.1)


# What can be read


def test_ratios_and_selection_are_readable_at_any_time():
    layer = SSN(CHANNELS)
    assert layer.mean_ratios.tolist() == pytest.approx([1 / 3] * 3)
    assert layer.selected == (None, None)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.1, 0.0, -0.1]))
    set_radius(layer, 0.3)
    expected = [1 / 3 + 0.3 / math.sqrt(2), 1 / 3, 1 / 3 - 0.3 / math.sqrt(2)]
    assert layer.mean_ratios.tolist() == pytest.approx(expected)
    for ratios in (layer.mean_ratios, layer.var_ratios):
        assert ratios.shape == (3,)
        assert not ratios.requires_grad
    with torch.no_grad():
        layer.mean_weight[1] = 2
    assert layer.selected == (None, None)  # one-hot by its control parameters, not decided yet
    set_radius(layer, 0.3)
    assert layer.selected == ('LN', None)
    set_radius(layer, 1.0)
    assert layer.selected == ('LN', 'BN')


def test_ratios_handed_out_are_not_the_state():
    layer = SSN(CHANNELS)
    set_radius(layer, 1.0)
    layer.mean_ratios.fill_(0.5)
    layer.var_ratios.zero_()
    assert layer.selected == ('BN', 'BN')
    assert layer.mean_ratios.tolist() == layer.var_ratios.tolist() == [0, 0, 1]


def test_print_shows_settings_ratios_and_selection():
    layer = SSN(8, momentum=None, normalizers=('IN', 'BN', 'GN'), num_groups=4, correction=1)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.6, 0.4, -0.3]))
    set_radius(layer, 0.5)
    text = repr(layer)
    for part in (
        'SSN(8, ',
        'eps=1e-05',
        'momentum=None',
        'affine=True',
        'track_running_stats=True',
        "normalizers=('IN', 'BN', 'GN')",
        'num_groups=4',
        'correction=1',
        'mean_ratios=(IN 0.704 BN 0.296 GN 0.000)',
        'radius=0.5000',
        'selected=(None, None)',
    ):
        assert part in text
    set_radius(layer, 1.0)
    assert "selected=('IN', 'GN')" in str(nn.Sequential(layer))
    assert 'num_groups' not in repr(SSN(8))
    assert 'SN(8, eps=1e-05, momentum=0.1' in repr(SN(8))


def test_reset_parameters_starts_anew():
    layer = SSN(CHANNELS)
    with torch.no_grad():
        layer.mean_weight[0] = 1
        layer.weight.normal_()
    layer(torch.randn(SHAPE))
    set_radius(layer, 1.0)
    layer.reset_parameters()
    fresh = SSN(CHANNELS).state_dict()
    torch.testing.assert_close(dict(layer.state_dict()), dict(fresh))
    set_radius(layer, 0.2)
    assert layer.selected == (None, None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(SHAPE)).square().mul(torch.randn(SHAPE)).sum().backward()
    optimizer.step()
    assert layer.mean_weight.abs().max() > 0
    assert layer.var_weight.abs().max() > 0


# Precision


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('radius', [0.0, 0.4, 1.0])
def test_layer_in_half_precision(dtype, radius):
    layer = SSN(CHANNELS)
    set_radius(layer, radius)
    x = torch.randn(SHAPE)
    expected = layer(x)
    half = SSN(CHANNELS).to(dtype)
    set_radius(half, radius)
    y = half(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
    y.backward(torch.randn_like(y))
    assert all(parameter.grad.dtype == dtype for parameter in half.parameters())
    assert half.eval()(x.to(dtype)).isfinite().all()
    assert half.num_batches_tracked == 1


@pytest.mark.parametrize('shape', [SHAPE, (2, CHANNELS, 96, 67)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('radius', [0.0, 0.4, 1.0])
@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
def test_autocast_changes_nothing(dtype, radius, memory_format, shape):
    for x in (torch.randn(shape), torch.randn(shape).to(dtype)):
        x = x.contiguous(memory_format=memory_format)
        upstream = torch.randn_like(x)
        layer = SSN(CHANNELS)
        set_radius(layer, radius)
        expected = outputs(layer, x, upstream)
        with torch.autocast('cpu', dtype=dtype):
            found = outputs(layer, x, upstream)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
def test_autocast_gives_the_dtypes_of_batch_norm(dtype):
    layer, norm = (nn.Sequential(nn.Conv2d(3, CHANNELS, 3), n) for n in (SSN(6), nn.BatchNorm2d(6)))
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast('cpu', dtype=dtype):
        y, expected = layer(x), norm(x)
        assert layer[1](x.new_ones(2, CHANNELS, 3, 3)).dtype == torch.float32
    assert y.dtype == expected.dtype == dtype
    y.float().square().mul(torch.randn(y.shape)).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    assert layer[1].running_var.dtype == torch.float32


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('radius', [0.0, 0.5, 1.0])
def test_nan_control_parameters_raise_nothing_and_select_nothing(radius, bad):
    layer = SSN(CHANNELS)
    with torch.no_grad():
        layer.mean_weight[1] = bad
    set_radius(layer, radius)
    assert layer(torch.randn(SHAPE)).isnan().all()
    assert layer.mean_ratios.isnan().all()
    assert layer.selected[0] is None
    assert layer.mean_fixed == 0
    assert 'selected=(None' in repr(layer)


# What the host framework must not do to it


def test_is_no_batch_norm():
    # convert_sync_batchnorm and the fusion with convolutions would turn it into something else.
    model = nn.Sequential(SSN(4), SN(4))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(m) for m in converted] == [SSN, SN]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('layer', [SSN, SN])
def test_forward_reads_no_value_on_the_host(layer, momentum, training):
    with FakeTensorMode():
        module = layer(CHANNELS, momentum=momentum).train(training)
        x = torch.randn(SHAPE, requires_grad=True)
        y = module(x)
        y.backward(torch.randn_like(y))
        assert all(p.grad.shape == p.shape for p in (x, *module.parameters()))


@ONE_GRAPH
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('radius', [0.4, 1.0])
def test_compiles_to_one_graph(radius, training, memory_format):
    torch.compiler.reset()
    layer = SSN(CHANNELS)
    set_radius(layer, radius)
    again = copy.deepcopy(layer.train(training))
    compiled = torch.compile(again, fullgraph=True, backend='aot_eager')
    x, upstream = (t.contiguous(memory_format=memory_format) for t in torch.randn(2, *SHAPE))
    found = outputs(compiled, x, upstream)
    torch.testing.assert_close(found, outputs(layer, x, upstream))
    torch.testing.assert_close(dict(again.named_buffers()), dict(layer.named_buffers()))


@pytest.mark.parametrize('radius', [0.4, 1.0])
def test_compiles_around_what_this_torch_cannot(radius):
    torch._dynamo.reset()
    layer = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), SSN(CHANNELS), nn.ReLU())
    set_radius(layer, radius)
    again = copy.deepcopy(layer)
    x, upstream = torch.randn(2, 3, 8, 8), torch.randn(2, CHANNELS, 6, 6)
    for run in (layer, torch.compile(again, backend='aot_eager')):
        run(x).backward(upstream)
    for ours, theirs in zip(again.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(dict(again.named_buffers()), dict(layer.named_buffers()))


@ONE_GRAPH
@pytest.mark.slow
@pytest.mark.parametrize('layer', [SSN, SN])
def test_compiled_code_gives_the_same(layer):
    torch.compiler.reset()
    layer = layer(CHANNELS)
    again = copy.deepcopy(layer)
    compiled = torch.compile(again, fullgraph=True)
    for _ in range(2):
        x, upstream = torch.randn(2, *SHAPE)
        found = outputs(compiled, x, upstream)
        torch.testing.assert_close(found, outputs(layer, x, upstream), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dict(again.named_buffers()), dict(layer.named_buffers()))


@pytest.mark.parametrize('radius', [0.3, 1.0])
def test_functional_call_takes_the_tensors_it_is_given(radius):
    source, layer = SSN(CHANNELS), SSN(CHANNELS)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
        source.running_mean.normal_()
    set_radius(source, radius)
    tensors = dict(source.named_parameters()) | dict(source.named_buffers())
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(SHAPE)
    for training in (False, True):
        y = torch.func.functional_call(layer.train(training), tensors, x)
        assert torch.equal(y, source.train(training)(x))
    assert torch.equal(tensors['running_mean'], source.running_mean)
    torch.testing.assert_close(dict(layer.state_dict()), dict(before))


def test_layer_made_on_the_meta_device():
    with torch.device('meta'):
        layer = SSN(CHANNELS)
    assert layer(torch.empty(SHAPE, device='meta')).shape == SHAPE
    layer.to_empty(device='cpu').load_state_dict(SSN(CHANNELS).state_dict())
    assert layer(torch.randn(SHAPE)).isfinite().all()


@pytest.mark.parametrize(
    ('channels', 'groups', 'told'),
    [(48, 24, 'num_groups=24,'), (67, 1, 'num_groups=1 (which is LN)'), (12, 12, '(which is IN)')],
)
@pytest.mark.parametrize('kind', [SSN, SyncSSN, SN])
def test_gn_takes_every_number_of_channels(kind, channels, groups, told):
    """Undecided and decided, forward and backward, saved and collapsed, it is torch's GroupNorm."""
    layer = kind(channels, normalizers=('LN', 'GN', 'BN'))
    assert told in repr(layer)
    x = torch.randn(3, channels, 4, 5, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.mean_weight.grad.isfinite().all()
    if kind is SN:
        return
    with torch.no_grad():
        for weight in (layer.mean_weight, layer.var_weight):
            weight.copy_(torch.tensor([0.0, 1.0, 0.0]))
    set_radius(layer, 1.0)
    again = kind(channels, normalizers=('LN', 'GN', 'BN'))
    again.load_state_dict(layer.state_dict())
    expected = nn.GroupNorm(groups, channels)
    upstream = torch.randn(x.shape)
    (wanted,) = torch.autograd.grad(expected(x), x, upstream)
    for found in (layer, again, collapse_ssn(again)):
        assert torch.allclose(found(x), expected(x), atol=1e-5)
        (gradient,) = torch.autograd.grad(found(x), x, upstream)
        assert torch.allclose(gradient, wanted, atol=1e-4)


# One number per channel


ONE_NUMBER = r"x: got shape \(4, 64\) in training, where 'IN' .*normalizers=\('LN', 'BN', 'GN'\)"


@pytest.mark.parametrize('kind', [SSN, SSN1d, SyncSSN])
def test_an_undecided_layer_refuses_vectors_in_training(kind):
    """The variance of 'IN' is 0 there, and what selects it is a constant."""
    layer, x = kind(64), torch.randn(4, 64)
    with pytest.raises(ValueError, match=ONE_NUMBER):
        layer(x)
    assert not layer.num_batches_tracked
    layer.select(mean='LN')
    with pytest.raises(ValueError, match=ONE_NUMBER):
        layer(x)
    assert layer.eval()(x).shape == x.shape


def test_a_group_per_channel_is_refused_too():
    layer, x = SSN(8, normalizers=('LN', 'GN')), torch.randn(4, 8)
    assert layer.num_groups == 8
    with pytest.raises(ValueError, match=r"where 'GN' .*normalizers=\('LN', 'BN'\)"):
        layer(x)
    assert SSN(64, normalizers=('LN', 'BN', 'GN'))(torch.randn(4, 64)).isfinite().all()


def test_vectors_are_refused_although_something_wrote_to_the_buffers():
    """As DistributedDataParallel does, which sends those of process 0 to all."""
    layer = SSN(64)
    layer.mean_fixed.fill_(0)
    assert layer.known_choices() is None
    with pytest.raises(ValueError, match=ONE_NUMBER):
        layer(torch.randn(4, 64))


def test_a_decided_layer_takes_vectors(monkeypatch):
    monkeypatch.setattr('ssn_plugin.layers.ssn._warned', False)
    layer, x = SSN(64), torch.randn(4, 64)
    layer.select('LN', 'BN')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        layer(x)
    layer.select(mean='IN')  # as files from before may say
    with pytest.warns(UserWarning, match="where 'IN' has a variance of 0"):
        assert torch.equal(layer(x), torch.zeros_like(x))


def test_a_map_of_one_pixel_is_warned_of_once(monkeypatch):
    monkeypatch.setattr('ssn_plugin.layers.ssn._warned', False)
    layer, x = SSN(64), torch.randn(4, 64, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        layer(torch.randn(4, 64, 2, 1))
        layer.eval()(x)
        SSN(64, normalizers=('LN', 'BN'))(x)
    layer.train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        layer(x)
        layer(x)
    (once,) = told
    assert "got shape (4, 64, 1, 1) in training, where 'IN'" in str(once.message)
    assert once.filename == __file__
