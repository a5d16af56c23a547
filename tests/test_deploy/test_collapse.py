"""Collapsing: the same outputs from plain layers, and nothing of the model lost or shared."""

import copy
import itertools
import pickle

import pytest
import torch
from random_state import randomize_affine_and_running
from torch import nn

from ssn_plugin import SSN, SelectedNorm, SSN1d, SSN2d, SSN3d, collapse_ssn, set_radius
from ssn_plugin.deploy.collapse import choices_of, replace_ssn
from ssn_plugin.layers import plain_norms

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
PAIRS = list(itertools.product(NORMALIZERS, NORMALIZERS))
CHANNELS, GROUPS = 6, 3


def decided(mean: str = 'BN', var: str | None = None, kind: type = SSN, **settings) -> SSN:
    """A layer with random parameters and running statistics that chose those normalizers."""
    layer = kind(CHANNELS, eps=1e-3, normalizers=NORMALIZERS, num_groups=GROUPS, **settings)
    with torch.no_grad():
        layer.mean_weight[NORMALIZERS.index(mean)] = 2
        layer.var_weight[NORMALIZERS.index(var or mean)] = 2
        randomize_affine_and_running(layer)
        if layer.running_mean is not None:
            layer.num_batches_tracked.fill_(7)
    set_radius(layer, 0.3)
    assert layer.selected == (mean, var or mean)
    return layer


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(('mean', 'var'), PAIRS)
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('tracks', [True, False])
def test_outputs_stay(mean, var, correction, tracks):
    layer = decided(mean, var, correction=correction, track_running_stats=tracks).double().eval()
    collapsed = collapse_ssn(layer)
    assert not isinstance(collapsed, SSN)
    for shape in ((4, CHANNELS, 5, 7), (3, CHANNELS, 1, 1), (2, CHANNELS, 9, 1)):
        x = torch.randn(shape, dtype=torch.float64) + 3
        torch.testing.assert_close(collapsed(x), layer(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ('normalizer', 'kind'),
    [('BN', nn.BatchNorm2d), ('IN', nn.InstanceNorm2d), ('LN', nn.GroupNorm), ('GN', nn.GroupNorm)],
)
def test_torch_layers(normalizer, kind):
    for cls in (SSN, SSN2d):
        collapsed = collapse_ssn(decided(normalizer, kind=cls))
        assert isinstance(collapsed, kind)
        native = collapse_ssn(decided(normalizer, kind=cls, correction=1), native=True)
        assert type(native) is type(collapsed)
    groups = {'LN': 1, 'GN': GROUPS}
    assert getattr(collapsed, 'num_groups', None) == groups.get(normalizer)
    # Without `native` only BN, whose running variance is what it is, has a torch layer.
    exact = collapse_ssn(decided(normalizer, correction=1))
    assert isinstance(exact, nn.BatchNorm2d if normalizer == 'BN' else SelectedNorm)


def test_classes_by_dimension():
    assert type(collapse_ssn(decided(kind=SSN1d))) is nn.BatchNorm1d
    assert type(collapse_ssn(decided(kind=SSN2d))) is nn.BatchNorm2d
    assert type(collapse_ssn(decided(kind=SSN3d))) is nn.BatchNorm3d
    assert type(collapse_ssn(decided(kind=SSN))) is plain_norms.BatchNorm
    assert isinstance(collapse_ssn(decided('IN', kind=SSN1d)), nn.InstanceNorm1d)
    assert isinstance(collapse_ssn(decided('IN', kind=SSN3d)), nn.InstanceNorm3d)
    assert isinstance(collapse_ssn(decided('LN', 'BN', kind=SSN3d)), SelectedNorm)


@pytest.mark.parametrize(
    ('kind', 'shapes'),
    [
        (SSN, [(4, 6), (4, 6, 5), (4, 6, 5, 7), (2, 6, 3, 4, 5)]),
        (SSN1d, [(4, 6), (4, 6, 5)]),
        (SSN2d, [(4, 6, 5, 7)]),
        (SSN3d, [(2, 6, 3, 4, 5)]),
    ],
)
@pytest.mark.parametrize('normalizer', [*NORMALIZERS, 'LN/BN'])
@pytest.mark.parametrize('training', [False, True])
def test_every_dimension(kind, shapes, normalizer, training):
    mean, _, var = normalizer.partition('/')
    for shape in shapes:
        layer = decided(mean, var or mean, kind).train(training)
        collapsed = collapse_ssn(layer)
        assert collapsed.training == training
        x = torch.randn(shape)
        assert_same(collapsed(x), layer(x))


def test_a_group_per_channel_is_instance_norm():
    layer = SSN(6, normalizers=('BN', 'GN'), num_groups=6)
    set_radius(layer, 1.0)  # a tie: the last
    collapsed = collapse_ssn(layer)
    assert isinstance(collapsed, nn.InstanceNorm2d)
    assert_same(collapsed(torch.randn(1, 6, 1, 1)), torch.zeros(1, 6, 1, 1))


# What is preserved


def test_training_goes_on_alike():
    for normalizer in ('BN', 'LN/BN', 'IN'):
        mean, _, var = normalizer.partition('/')
        layer = decided(mean, var or mean, momentum=0.3)
        collapsed = collapse_ssn(copy.deepcopy(layer))
        for module in (layer, collapsed):
            torch.manual_seed(2)
            for _ in range(2):
                x = torch.randn(4, CHANNELS, 5, 5)
                y = module(x)
                y.backward(torch.randn_like(y))
        assert_same(collapsed.weight.grad, layer.weight.grad, 1e-4)  # sums of 200 products
        assert_same(collapsed.bias.grad, layer.bias.grad, 1e-4)
        for name, buffer in collapsed.named_buffers():
            if not name.startswith('_'):
                assert_same(buffer, getattr(layer, name))


def test_nested_and_shared_modules():
    shared = decided('LN', 'BN')
    block = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), shared)
    model = nn.ModuleDict({'a': block, 'b': nn.Sequential(block, shared), 'c': decided('IN')})
    model['a'].alias = shared
    assert collapse_ssn(model) is model
    assert not [m for m in model.modules() if isinstance(m, SSN)]
    new = model['a'][1]
    assert isinstance(new, SelectedNorm)
    assert model['b'][1] is new
    assert model['b'][0][1] is new
    assert model['a'].alias is new


def test_root():
    layer = decided('BN')
    assert isinstance(collapse_ssn(layer), nn.BatchNorm2d)
    assert isinstance(layer, SSN)  # itself it cannot become another class


def test_nothing_is_aliased():
    layer = decided('LN', 'BN')
    collapsed = collapse_ssn(layer)
    own = [t.data_ptr() for t in (*layer.parameters(), *layer.buffers())]
    for tensor in (*collapsed.parameters(), *collapsed.buffers()):
        assert tensor.data_ptr() not in own
    before = copy.deepcopy(collapsed.state_dict())
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(3)
    for name, tensor in collapsed.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize('normalizer', [*NORMALIZERS, 'LN/BN'])
def test_settings_and_values_are_kept(normalizer):
    mean, _, var = normalizer.partition('/')
    layer = decided(mean, var or mean, momentum=0.37)
    layer.weight.requires_grad_(False)
    layer.double()
    collapsed = collapse_ssn(layer.eval())
    assert not collapsed.training
    assert not collapsed.weight.requires_grad
    assert collapsed.bias.requires_grad
    assert collapsed.eps == 1e-3
    for name in ('weight', 'bias'):
        assert torch.equal(getattr(collapsed, name), getattr(layer, name))
        assert getattr(collapsed, name).dtype == torch.float64
    if 'BN' in normalizer:
        assert collapsed.momentum == 0.37
        for name in ('running_mean', 'running_var', 'num_batches_tracked'):
            assert torch.equal(getattr(collapsed, name), getattr(layer, name))
    assert not [key for key in collapsed.state_dict() if key not in layer.state_dict()]


@pytest.mark.parametrize('normalizer', [*NORMALIZERS, 'LN/BN'])
def test_without_affine_parameters(normalizer):
    mean, _, var = normalizer.partition('/')
    layer = decided(mean, var or mean, affine=False).eval()
    collapsed = collapse_ssn(layer)
    assert not list(collapsed.parameters())
    x = torch.randn(2, CHANNELS, 5, 7)
    assert_same(collapsed(x), layer(x))


def test_a_layer_in_evaluation_inside_a_training_model():
    model = nn.Sequential(decided('BN'), decided('BN').eval())  # as norm_eval leaves it
    collapse_ssn(model)
    assert [layer.training for layer in model] == [True, False]


def test_device():
    with torch.device('meta'):
        model = nn.Sequential(SSN(8))
    replace_ssn(model, {'0': ('LN', 'BN')})  # a meta layer has no values to choose by
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {'meta'}
    assert model(torch.empty(2, 8, 3, 3, device='meta')).shape == (2, 8, 3, 3)


def test_twice_is_harmless_and_the_result_is_ordinary():
    model = nn.Sequential(*(decided(*pair) for pair in PAIRS)).eval()
    x = torch.randn(2, CHANNELS, 5, 7)
    collapse_ssn(model)
    layers = list(model)
    y = model(x)
    assert collapse_ssn(model) is model
    assert all(a is b for a, b in zip(model, layers, strict=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)


def test_models_without_ssn_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = list(model)
    assert list(collapse_ssn(model)) == before


# Undecided layers


def half_decided() -> nn.Sequential:
    layer = SSN(CHANNELS)
    with torch.no_grad():
        layer.mean_weight[1] = 2
    set_radius(layer, 0.3)
    return nn.Sequential(decided('LN'), nn.Sequential(layer), SSN(CHANNELS))


def test_undecided_layers_are_refused():
    model = half_decided()
    before = list(model.modules())
    with pytest.raises(ValueError, match=r'^model: got 2 undecided of 3 SSN layers, .*: 1.0, 2$'):
        collapse_ssn(model)
    assert list(model.modules()) == before
    with pytest.raises(ValueError, match='one-hot: the model itself'):
        collapse_ssn(SSN(CHANNELS))


def test_undecided_layers_are_kept():
    model = half_decided().eval()
    x = torch.randn(2, CHANNELS, 5, 7)
    y = model(x)
    collapse_ssn(model, keep_undecided=True)
    assert [type(m) for m in model] == [plain_norms.GroupNorm, nn.Sequential, SSN]
    assert isinstance(model[1][0], SSN)
    assert_same(model(x), y)


def test_one_hot_ratios_that_may_move_are_no_choice():
    layer = SSN(CHANNELS)
    with torch.no_grad():
        for parameter in (layer.mean_weight, layer.var_weight):
            parameter[0] = 2
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match='got 1 undecided of 1 SSN layers'):
        choices_of(model)
    set_radius(model, 0.1)
    assert choices_of(model) == {'0': ('IN', 'IN')}


def test_choices_for_what_is_no_ssn():
    model = nn.Sequential(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="got a BatchNorm2d named '0' in the model, expected an"):
        replace_ssn(model, {'0': ('BN', 'BN')})
    with pytest.raises(ValueError, match="got nothing named 'x'"):
        replace_ssn(model, {'x': ('BN', 'BN')})


def test_native_differs_as_said():
    layer = decided('LN', correction=1).double().eval()
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64)
    collapsed = collapse_ssn(copy.deepcopy(layer), native=True)
    difference = (collapsed(x) - layer(x)).abs().max()
    assert 1e-3 < difference < 0.2  # H*W / (H*W - 1) is 1.067
