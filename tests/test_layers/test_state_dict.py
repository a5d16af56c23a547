"""State dict: keys, version, round trips, and the released files' shapes."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn

from ssn_plugin import SN, SSN, set_radius

CHANNELS = 6
KEYS = {
    'weight': (CHANNELS,),
    'bias': (CHANNELS,),
    'mean_weight': (3,),
    'var_weight': (3,),
    'running_mean': (CHANNELS,),
    'running_var': (CHANNELS,),
    'num_batches_tracked': (),
    'radius': (),
    'mean_fixed': (),
    'var_fixed': (),
}


def released_layer(mean_fixed: int = 0, var_fixed: int = 0, radius: float = 0.5) -> OrderedDict:
    """What one layer of a released file holds, in its shapes and dtypes."""
    state = OrderedDict(
        weight=torch.randn(1, CHANNELS, 1, 1),
        bias=torch.randn(1, CHANNELS, 1, 1),
        mean_weight=torch.tensor([0.2, 0.5, 0.1]),
        var_weight=torch.tensor([0.3, 0.1, 0.2]),
        running_mean=torch.randn(1, CHANNELS, 1),
        running_var=torch.rand(1, CHANNELS, 1),
        mean_fixed=torch.tensor([mean_fixed]),
        var_fixed=torch.tensor([var_fixed]),
        radius=torch.tensor([radius]),
    )
    if mean_fixed:
        state['mean_weight'] = torch.tensor([0.0, 1.0, 0.0])
    if var_fixed:
        state['var_weight'] = torch.tensor([1.0, 0.0, 0.0])
    assert state['mean_fixed'].dtype == torch.int64
    return state


def trained_layer(radius: float) -> SSN:
    layer = SSN(CHANNELS)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.mean_weight.copy_(torch.tensor([1.9, 0.0, 0.1]))  # one-hot by sparsemax
        layer.var_weight.copy_(torch.tensor([0.1, 0.2, 0.0]))
    set_radius(layer, radius)
    layer(torch.randn(4, CHANNELS, 5, 5))
    return layer


def through_a_file(state) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Own files


def test_keys_and_version():
    layer = SSN(CHANNELS)
    state = layer.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == KEYS
    assert state._metadata['']['version'] == SSN._version == 1
    assert SN(CHANNELS).state_dict()._metadata['']['version'] == 1
    assert set(SN(CHANNELS).state_dict()) == set(KEYS) - {'radius', 'mean_fixed', 'var_fixed'}


def test_keys_without_affine_or_running_statistics():
    affine, running = {'weight', 'bias'}, {'running_mean', 'running_var', 'num_batches_tracked'}
    assert set(SSN(CHANNELS, affine=False).state_dict()) == set(KEYS) - affine
    assert set(SSN(CHANNELS, track_running_stats=False).state_dict()) == set(KEYS) - running
    assert set(SSN(CHANNELS, normalizers=('IN', 'LN')).state_dict()) == set(KEYS) - running


@pytest.mark.parametrize('metadata', [True, False], ids=['with metadata', 'plain dict'])
@pytest.mark.parametrize('radius', [0.0, 0.5, 1.0])
def test_round_trip(radius, metadata):
    layer = trained_layer(radius)
    assert (layer.mean_fixed.item(), layer.var_fixed.item()) == (1, int(radius == 1))
    state = through_a_file(layer.state_dict())
    fresh = SSN(CHANNELS)
    fresh.load_state_dict(state if metadata else dict(state.items()), strict=True)
    torch.testing.assert_close(dict(fresh.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)
    assert fresh.selected == layer.selected
    assert fresh.known_choices() == layer.known_choices() is not None
    x = torch.randn(4, CHANNELS, 5, 5)
    assert torch.equal(fresh.eval()(x), layer.eval()(x))
    assert torch.equal(fresh.train()(x), layer.train()(x))


def test_round_trip_inside_a_model():
    model = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 1), trained_layer(1.0), nn.Sequential(SN(CHANNELS))
    )
    fresh = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), SSN(CHANNELS), nn.Sequential(SN(CHANNELS)))
    fresh.load_state_dict(through_a_file(model.state_dict()), strict=True)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(fresh(x), model(x))


def test_loading_by_assignment():
    layer = trained_layer(1.0)
    fresh = SSN(CHANNELS)
    fresh.load_state_dict(through_a_file(layer.state_dict()), strict=True, assign=True)
    assert fresh.selected == layer.selected
    assert fresh.known_choices() == layer.known_choices()
    x = torch.randn(4, CHANNELS, 5, 5)
    assert torch.equal(fresh(x), layer(x))


def test_loading_into_half_precision():
    layer = trained_layer(1.0)
    half = SSN(CHANNELS).half()
    half.load_state_dict(layer.state_dict())
    assert half.selected == layer.selected
    assert half.mean_weight.dtype == torch.float16


def test_saving_never_pairs_a_flag_with_ratios_that_are_not_one_hot():
    layer = trained_layer(1.0)
    expected = layer.selected
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.1, 0.7, 0.2]))
        layer.var_weight.mul_(0.9)
    state = layer.state_dict()
    for name in ('mean', 'var'):
        assert state[f'{name}_fixed'] == 1
        assert sorted(state[f'{name}_weight'].tolist()) == [0, 0, 1]
    fresh = SSN(CHANNELS)
    fresh.load_state_dict(state)
    assert fresh.selected == expected


def test_state_dict_does_not_touch_an_undecided_layer():
    layer = SSN(CHANNELS, radius=0.4)
    with torch.no_grad():
        layer.mean_weight.normal_()
    before = layer.mean_weight.detach().clone()
    layer.state_dict()
    assert torch.equal(layer.mean_weight, before)


def test_loading_does_not_change_what_it_is_given():
    for state in (released_layer(), trained_layer(0.5).state_dict()):
        before = copy.deepcopy(state)
        SSN(CHANNELS).load_state_dict(state)
        assert list(state) == list(before)
        assert all(torch.equal(state[key], before[key]) for key in state)


def test_batch_norm_weights_load_where_they_fit():
    norm = nn.BatchNorm2d(CHANNELS)
    norm(torch.randn(4, CHANNELS, 5, 5))
    layer = SSN(CHANNELS)
    missing, unexpected = layer.load_state_dict(norm.state_dict(), strict=False)
    assert set(missing) == {'mean_weight', 'var_weight', 'radius', 'mean_fixed', 'var_fixed'}
    assert unexpected == []
    assert torch.equal(layer.running_var, norm.running_var)


@pytest.mark.parametrize('key', KEYS)
def test_missing_key_of_an_own_file_is_an_error(key):
    state = SSN(CHANNELS).state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        SSN(CHANNELS).load_state_dict(state)


@pytest.mark.parametrize('key', sorted(set(KEYS) - {'num_batches_tracked'}))
def test_missing_key_of_a_released_file_is_an_error(key):
    state = released_layer()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        SSN(CHANNELS).load_state_dict(state)


@pytest.mark.parametrize('key', ['weight', 'running_mean', 'mean_weight'])
def test_wrong_size_is_an_error(key):
    state = released_layer()
    state[key] = torch.randn(1, CHANNELS + 2, 1)
    with pytest.raises(RuntimeError, match=f'size mismatch for {key}'):
        SSN(CHANNELS).load_state_dict(state)


# Released files


def test_released_layer_loads_without_conversion():
    released = released_layer()
    layer = SSN(CHANNELS)
    layer.load_state_dict(released, strict=True)
    state = layer.state_dict()
    for key, value in released.items():
        assert torch.equal(state[key], value.reshape(KEYS[key])), key
        assert state[key].dtype == value.dtype
    assert state['num_batches_tracked'] == 0
    assert layer.selected == (None, None)
    # The centre and the circle of the paper with the loaded radius.
    assert (layer.mean_ratios - 1 / 3).norm().item() == pytest.approx(0.5)


def test_a_file_without_a_count_of_batches_leaves_the_count_as_it_is():
    layer = SSN(CHANNELS)
    for _ in range(2):
        layer(torch.randn(4, CHANNELS, 5, 5))
    layer.load_state_dict(released_layer())
    assert layer.num_batches_tracked == 2  # as BatchNorm2d does


@pytest.mark.parametrize('mean_fixed', [0, 1])
@pytest.mark.parametrize('var_fixed', [0, 1])
@pytest.mark.parametrize('radius', [0.0, 0.5, 1.0])
def test_released_flags_count_whatever_the_radius(mean_fixed, var_fixed, radius):
    layer = SSN(CHANNELS)
    layer.load_state_dict(released_layer(mean_fixed, var_fixed, radius), strict=True)
    chosen = 'LN' if mean_fixed or radius == 1 else None, 'IN' if var_fixed or radius == 1 else None
    assert layer.selected == chosen
    assert (layer.mean_fixed.item(), layer.var_fixed.item()) == (mean_fixed, var_fixed)
    # Frozen from the moment of loading.
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(torch.randn(4, CHANNELS, 5, 5)).backward(torch.randn(4, CHANNELS, 5, 5))
    optimizer.step()
    state = layer.state_dict()
    assert (state['mean_weight'].tolist() == [0, 1, 0]) == bool(mean_fixed)
    assert (state['var_weight'].tolist() == [1, 0, 0]) == bool(var_fixed)


def test_released_layer_computes_what_its_release_computed_in_evaluation():
    released = released_layer(1, 1, 1.0)
    layer = SSN(CHANNELS, correction=1).eval()
    layer.load_state_dict(released)
    x = torch.randn(4, CHANNELS, 5, 5)
    mean = x.mean((1, 2, 3), keepdim=True)
    var = x.var((2, 3), keepdim=True)
    expected = (x - mean) / (var + 1e-5).sqrt() * released['weight'] + released['bias']
    torch.testing.assert_close(layer(x), expected)


def test_released_model_with_names_of_a_resnet():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, CHANNELS, 1, bias=False)
            self.sn1 = SSN(CHANNELS)
            self.downsample = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), SSN(CHANNELS))

    first, second = released_layer(1, 0), released_layer(0, 1)
    state = {
        'conv1.weight': torch.randn(6, 3, 1, 1),
        'downsample.0.weight': torch.randn(6, 6, 1, 1),
    }
    state |= {f'sn1.{key}': value for key, value in first.items()}
    state |= {f'downsample.1.{key}': value for key, value in second.items()}
    model = Stem()
    model.load_state_dict(through_a_file(state), strict=True)
    assert model.sn1.selected == ('LN', None)
    assert model.downsample[1].selected == (None, 'IN')
    set_radius(model, 1.0)
    assert model.sn1.selected == ('LN', 'IN')


def test_released_state_survives_the_first_own_save():
    layer = SSN(CHANNELS)
    layer.load_state_dict(released_layer(1, 0))
    layer(torch.randn(4, CHANNELS, 5, 5))
    again = SSN(CHANNELS)
    again.load_state_dict(through_a_file(layer.state_dict()), strict=True)
    assert again.num_batches_tracked == 1
    torch.testing.assert_close(dict(again.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)


def test_a_layer_built_on_the_meta_device_gets_its_values_from_a_file():
    source = SSN(4)
    source.mean_weight.data[0] = 1
    set_radius(source, 1.0)
    with torch.device('meta'):
        layer = SSN(4)
    assert 'SSN(4, eps=' in repr(copy.deepcopy(layer))
    layer.load_state_dict(source.state_dict(), assign=True)
    assert layer.selected == source.selected == ('IN', 'BN')
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(layer(x), source(x))


def test_a_frozen_choice_that_is_nan_is_refused():
    layer = SSN(4)
    set_radius(layer, 1.0)
    state = layer.state_dict()
    state['mean_weight'] = torch.tensor([float('nan'), 0.0, 1.0])
    with pytest.raises(RuntimeError, match=r'mean_weight: got .*nan.* expected a one-hot vector'):
        SSN(4).load_state_dict(state)
