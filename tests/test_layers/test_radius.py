"""set_radius: what it sets, what it freezes, what it leaves alone and what it costs."""

import copy
import math
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from ssn_plugin import SN, SSN, set_radius, undecided_layers
from ssn_plugin.layers import radius as ways
from ssn_plugin.layers.radius import copy_selection
from ssn_plugin.ops.sparsestmax import circumradius
from ssn_plugin.ops.switchable_norm.ratios import UNKNOWN

CANDIDATES = ('IN', 'LN', 'BN', 'GN')


def ssn(size: int = 3, channels: int = 4) -> SSN:
    """A layer of that many candidates, leaning to the first one."""
    layer = SSN(channels, normalizers=CANDIDATES[:size], num_groups=2)
    with torch.no_grad():
        for parameter in (layer.mean_weight, layer.var_weight):
            parameter.copy_(torch.arange(size, 0, -1) * 1e-3)
    return layer


class Nested(nn.Module):
    """Layers at several depths, one of them used twice, beside other norms."""

    def __init__(self):
        super().__init__()
        self.sn1 = ssn()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ModuleDict({'norm': ssn()}))
        self.again = self.sn1
        self.others = nn.ModuleList([nn.BatchNorm2d(4), SN(4)])


def test_every_layer_of_the_model_is_reached_and_nothing_else():
    model = Nested()
    before = copy.deepcopy(model.others.state_dict())
    for radius in (0.0, 0.25, 0.5):
        set_radius(model, radius)
        for layer in (model.sn1, model.block[1]['norm']):
            assert layer.radius.item() == radius
            assert (layer.mean_ratios - 1 / 3).norm().item() == pytest.approx(
                max(radius, 2**0.5 * 1e-3), rel=1e-4
            )
    torch.testing.assert_close(dict(model.others.state_dict()), dict(before))
    set_radius(model.sn1, 0.3)  # a layer is a model too
    assert model.block[1]['norm'].radius == 0.5


def test_model_without_layers():
    assert set_radius(nn.Linear(2, 2), 0.5) is None
    assert undecided_layers(nn.Linear(2, 2)) == []


@pytest.mark.parametrize('radius', [-0.1, -math.inf, math.nan, 'large', None, True, [0.5]])
def test_bad_radius_changes_nothing(radius):
    layer = ssn()
    with pytest.raises(
        ValueError, match=r'radius: got .*, expected a number of at least 0'
    ) as caught:
        set_radius(layer, radius)
    assert repr(radius) in str(caught.value)
    assert layer.radius == 0


# Freezing


@pytest.mark.parametrize('radius', [0.7, 0.72, 0.82, 0.87, 1.0, math.inf])
def test_models_of_several_candidate_counts_and_precisions(radius):
    model = nn.ModuleList(
        ssn(size).to(dtype)
        for size in (2, 3, 4)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    )
    set_radius(model, radius)
    for layer in model:
        size = len(layer.normalizers)
        frozen = radius >= circumradius(size)
        assert layer.mean_fixed == layer.var_fixed == frozen
        expected = ['IN'] * 2 if frozen else [None] * 2
        assert list(layer.selected) == expected
        if frozen:
            one_hot = [1.0] + [0.0] * (size - 1)
            assert layer.mean_ratios.tolist() == layer.var_ratios.tolist() == one_hot
    assert undecided_layers(model) == [
        str(index)
        for index, layer in enumerate(model)
        if radius < circumradius(len(layer.normalizers))
    ]


def test_exactly_at_the_circumradius():
    for size in (2, 3, 4):
        layer = ssn(size)
        set_radius(layer, circumradius(size) - 1e-4)
        assert layer.mean_fixed == 0
        set_radius(layer, circumradius(size))
        assert layer.selected == ('IN', 'IN')
        assert layer.mean_fixed == layer.var_fixed == 1


def test_initial_layer_selects_bn():
    layer = SSN(4)
    set_radius(layer, 0.5)
    assert layer.mean_ratios.argmax() == 2
    set_radius(layer, 1.0)
    assert layer.selected == ('BN', 'BN')
    assert layer.state_dict()['mean_weight'].tolist() == [0, 0, 1]


def test_mean_and_variance_freeze_independently():
    # A gap above one is one-hot by sparsemax, at radius zero.
    for first, second in (('mean', 'var'), ('var', 'mean')):
        layer = ssn()
        with torch.no_grad():
            getattr(layer, f'{first}_weight')[1] = 2
        set_radius(layer, 0.0)
        assert getattr(layer, f'{first}_fixed') == 1
        assert getattr(layer, f'{first}_ratios').tolist() == [0, 1, 0]
        assert getattr(layer, f'{second}_fixed') == 0
        torch.testing.assert_close(
            getattr(layer, f'{second}_weight'), torch.tensor([3e-3, 2e-3, 1e-3])
        )
        assert undecided_layers(layer) == ['']
        set_radius(layer, 1.0)
        assert dict(zip(('mean', 'var'), layer.selected, strict=True)) == {
            first: 'LN',
            second: 'IN',
        }


def test_flags_are_as_in_the_released_files():
    layer = ssn()
    assert layer.mean_fixed.dtype == layer.var_fixed.dtype == torch.int64
    assert layer.radius.dtype == torch.float32
    assert layer.mean_fixed == layer.var_fixed == 0


@pytest.mark.parametrize('gap', [1, 1 - 2**-24, 1 - 2**-23, 1 - 1e-6])
def test_frozen_vector_is_exactly_one_hot(gap):
    # Ratios such as (1, 6e-8, 0) have a maximum of one without being one-hot.
    for radius in (0.0, 0.5, 0.8164):
        layer = ssn()
        with torch.no_grad():
            layer.mean_weight.copy_(torch.tensor([0.0, -gap, -5.0], dtype=torch.float64))
        set_radius(layer, radius)
        if layer.mean_fixed:
            assert layer.mean_ratios.tolist() == [1, 0, 0]
        else:
            assert layer.selected[0] is None


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_frozen_vector_of_a_half_precision_layer_is_exactly_one_hot(dtype):
    # Just below the circumradius the largest ratio is rounded to one, the others are not zero.
    for radius in (0.8, 0.815, 0.816, 0.8164, 0.82):
        layer = ssn().to(dtype)
        set_radius(layer, radius)
        for ratios, flag in (
            (layer.mean_ratios, layer.mean_fixed),
            (layer.var_ratios, layer.var_fixed),
        ):
            if flag:
                assert ratios.tolist() == [1, 0, 0]
            else:
                assert ratios.max() < 1
    assert layer.mean_fixed == 1


def test_no_later_radius_and_no_later_parameter_changes_a_frozen_choice():
    layer = ssn()
    set_radius(layer, 1.0)
    for radius in (0.0, 0.5, 1.0):
        set_radius(layer, radius)
        assert layer.radius == radius
        assert layer.selected == ('IN', 'IN')
        assert layer.mean_ratios.tolist() == [1, 0, 0]
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.0, 5.0, 0.0]))
    set_radius(layer, 1.0)
    assert layer.selected == ('IN', 'IN')
    assert layer.state_dict()['mean_weight'].tolist() == [1, 0, 0]


def test_layers_without_gradient_keep_radius_and_ratios():
    # A frozen stage of a backbone, decided or not.
    model = nn.ModuleList([ssn(), ssn(), ssn()])
    set_radius(model[1], 1.0)
    for layer in model[:2]:
        layer.requires_grad_(False)
    set_radius(model[0].requires_grad_(True), 0.3)
    model[0].requires_grad_(False)
    before = [copy.deepcopy(layer.state_dict()) for layer in model[:2]]
    ratios = [layer.mean_ratios for layer in model[:2]]
    for radius in (0.0, 0.6, 1.0):
        set_radius(model, radius)
        for layer, state, old in zip(model[:2], before, ratios, strict=True):
            torch.testing.assert_close(dict(layer.state_dict()), dict(state), rtol=0, atol=0)
            assert torch.equal(layer.mean_ratios, old)
    assert model[2].mean_fixed == 1
    assert undecided_layers(model) == ['0']


def test_gradient_of_frozen_control_parameters_is_zero_rather_than_none():
    layer = ssn()
    with torch.no_grad():
        layer.mean_weight[0] = 2
    set_radius(layer, 0.3)  # the mean is frozen, the variance is not
    layer(torch.randn(3, 4, 5, 5)).backward(torch.randn(3, 4, 5, 5))
    assert layer.mean_weight.grad.tolist() == [0, 0, 0]
    assert layer.var_weight.grad.abs().max() > 0


def test_undecided_layers_names_every_layer_that_is_not_one_hot():
    model = Nested()
    assert undecided_layers(model) == ['sn1', 'block.1.norm']
    set_radius(model.sn1, 1.0)
    assert undecided_layers(model) == ['block.1.norm']
    set_radius(model, 1.0)
    assert undecided_layers(model) == []


def test_copied_selection_makes_a_model_follow_another():
    source, target = Nested(), Nested()
    with torch.no_grad():
        target.sn1.mean_weight.copy_(torch.tensor([0.0, 0.0, 0.5]))
    before = copy.deepcopy(target.state_dict())
    set_radius(source.sn1, 1.0)
    set_radius(source.block, 0.3)
    copy_selection(source, target)
    assert target.sn1.selected == ('IN', 'IN')
    assert target.sn1.radius == 1
    assert target.block[1]['norm'].selected == (None, None)
    assert target.block[1]['norm'].radius.item() == pytest.approx(0.3)
    # Its files are as consistent as any; nothing but selections was copied.
    after = target.state_dict()
    assert after['sn1.mean_weight'].tolist() == [1, 0, 0]
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert {key.rpartition('.')[2] for key in changed} == {
        'radius', 'mean_fixed', 'var_fixed', 'mean_weight', 'var_weight',
    }  # fmt: skip


def wrapped_inside(model: nn.Module) -> nn.Module:
    model.block[1] = checkpoint_wrapper(nn.DataParallel(model.block[1]))
    return model


@pytest.mark.parametrize(
    'wrap',
    [torch.compile, AveragedModel, checkpoint_wrapper, wrapped_inside],
    ids=['compile', 'average', 'checkpointing', 'inside'],
)
def test_selection_is_copied_through_wrappers(wrap):
    source, target = Nested(), Nested()
    source.sn1.select('LN', 'IN')
    source.block[1]['norm'].select('BN', 'LN')
    expected = [('LN', 'IN'), ('BN', 'LN')]
    for ours, theirs in ((source, wrap(target)), (wrap(source), Nested())):
        copy_selection(ours, theirs)
        found = [layer.selected for layer in theirs.modules() if isinstance(layer, SSN)]
        assert found == expected


def test_selection_is_not_copied_to_a_model_of_another_structure():
    """Nor to a part of it."""
    other = Nested()
    other.block[1]['norm'] = SSN(8, normalizers=('LN', 'BN'))
    fewer = nn.Sequential(Nested().sn1)
    source = Nested()
    set_radius(source, 1.0)
    for target, told in ((other, r"SSN 'block.1.norm' with \('LN', 'BN'\)"), (fewer, "SSN '0'")):
        with pytest.raises(ValueError, match=f'target: got {told}.* where source has'):
            copy_selection(source, target)
        assert all(
            layer.selected == (None, None) for layer in target.modules() if isinstance(layer, SSN)
        )
    with pytest.raises(ValueError, match='got SSN none where source has'):
        copy_selection(source, nn.Conv2d(3, 8, 3))


@pytest.fixture
def reads(monkeypatch):
    """What is read from tensors, which waits for a GPU."""
    found = []
    for name in ('tolist', 'item', '__bool__', '__float__', '__int__', 'cpu', 'numpy'):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original):
            found.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return found


def _on_device(layers, known, control, value):
    ways._decide_on_device(layers, control, value)


@pytest.fixture
def on_device(monkeypatch):
    """Everything goes the way of GPUs."""
    monkeypatch.setattr(ways, '_decide', _on_device)


@pytest.mark.parametrize(('value', 'count'), [(0.0, 1), (0.4, 1), (1.0, 2)])
def test_a_gpu_is_not_waited_for(reads, on_device, value, count):
    model = nn.ModuleList(ssn() for _ in range(5))
    set_radius(model, 0.0)
    reads.clear()
    set_radius(model, value)
    assert len(reads) == count  # of the call before, whose numbers have arrived, and at one-hot


def leaders(steps: int) -> list[torch.Tensor]:
    """Control parameters of a training in which some layers come to lead by more than one."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 2, 3, generator=generator) * step / 8 for step in range(steps)]


def test_the_way_of_gpus_decides_the_same(monkeypatch):
    models = [nn.ModuleList(ssn() for _ in range(5)) for _ in range(2)]
    both = [ways._decide, _on_device]
    partly = 0
    for step, controls in enumerate(leaders(20)):
        for model, way in zip(models, both, strict=True):
            with torch.no_grad():
                for layer, (mean, var) in zip(model, controls, strict=True):
                    layer.mean_weight.copy_(mean)
                    layer.var_weight.copy_(var)
            monkeypatch.setattr(ways, '_decide', way)
            set_radius(model, step / 24)
        first, second = ([layer.selected for layer in model] for model in models)
        assert first == second
        partly += any(None in pair and pair != (None, None) for pair in first)
        for layer in models[1]:
            known = layer.known_choices()
            selected = [None if k is None else layer.normalizers[k] for k in known]
            assert all(k in (None, name) for k, name in zip(selected, layer.selected, strict=True))
    assert partly
    set_radius(models[1], 1.0)
    assert all(None not in layer.known_choices() for layer in models[1])
    twin = copy.deepcopy(models[1])
    assert [layer.selected for layer in twin] == [layer.selected for layer in models[1]]


def test_the_way_of_gpus_notices_who_writes_between(on_device):
    layer = ssn()
    with torch.no_grad():
        layer.mean_weight[1] = 2
    set_radius(layer, 0.0)
    layer.mean_fixed.zero_()
    with torch.no_grad():
        layer.mean_weight.zero_()
    set_radius(layer, 0.0)
    assert layer.known_choices() == (None, None)  # not what is on its way from before
    assert layer.selected == (None, None)
    set_radius(layer, 0.0)
    assert layer.known_choices() == (None, None)


@pytest.mark.parametrize('way', ['of the CPU', 'of GPUs'])
def test_choices_are_written_with_the_flags(way, monkeypatch):
    """The index of what is decided, and none for what is not, whatever leads there."""
    if way == 'of GPUs':
        monkeypatch.setattr(ways, '_decide', _on_device)
    layer = ssn()
    with torch.no_grad():
        layer.mean_weight[1] = 2
        layer.var_weight[0] = 0.1
    set_radius(layer, 0.0)
    assert (int(layer.mean_fixed), int(layer.mean_choice)) == (1, 1)
    assert (int(layer.var_fixed), int(layer.var_choice)) == (0, UNKNOWN)
    with torch.no_grad():
        layer.mean_weight[2] = 9
    layer.learn_choices()  # from the buffers, as after a broadcast
    assert layer.selected == ('LN', None)


def test_what_is_on_its_way_is_in_no_copy(on_device):
    """A CUDA event can neither be pickled nor copied."""
    layer = ssn()
    set_radius(layer, 1.0)
    assert layer._pending is not None
    layer._pending = threading.Lock(), *layer._pending[1:]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._pending is None
        assert twin.selected == layer.selected


def test_a_cast_or_a_move_leaves_known_what_was_known():
    layer = ssn()
    set_radius(layer, 1.0)
    known = layer.known_choices()
    assert None not in known
    assert layer.double().known_choices() == known
    assert layer.half().known_choices() == known
    # Between devices every buffer becomes another tensor.
    assert layer._apply(torch.clone).known_choices() == known
