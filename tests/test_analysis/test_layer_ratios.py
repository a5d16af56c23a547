"""Rows of what a model chose: of the model itself, and of its state dict without it."""

from collections import OrderedDict

import pytest
import torch
from released_files import released_state
from torch import nn

from ssn_plugin import SN, SSN, set_radius
from ssn_plugin.analysis.layer_ratios import layer_ratios, layer_ratios_of_state
from ssn_plugin.analysis.tables import selection_table
from ssn_plugin.checkpoint.candidates import Candidates
from ssn_plugin.ops import reference


def test_one_row_per_layer_in_order():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), SSN(4), nn.ReLU(), SN(6, normalizers=('IN', 'LN')))
    rows = layer_ratios(model)
    assert [row.layer for row in rows] == ['1', '3']
    assert [row.channels for row in rows] == [4, 6]
    assert rows[0].normalizers == ('IN', 'LN', 'BN')
    assert rows[0].mean_ratios == pytest.approx((1 / 3,) * 3)
    assert rows[1].ratios('var') == {'IN': 0.5, 'LN': 0.5}
    assert (rows[0].radius, rows[1].radius) == (0, None)
    assert not rows[0].decided
    assert rows[0].selected == (None, None)


def test_decided_needs_mean_and_variance():
    layer = SSN(4)
    layer.mean_weight.data[0] = 5.0
    set_radius(layer, 0.0)
    row = layer_ratios(layer)[0]
    assert not row.decided
    assert row.selected == ('IN', None)
    assert (row.mean_fixed, row.var_fixed) == (True, False)
    set_radius(layer, 1.0)
    row = layer_ratios(layer)[0]
    assert row.decided
    assert row.mean_ratios == (1, 0, 0)
    assert row.var_ratios == (0, 0, 1)
    assert (row.mean_fixed, row.var_fixed, row.radius) == (True, True, 1)


def test_one_hot_is_not_frozen_before_the_radius_is_set():
    layer = SSN(4)
    layer.mean_weight.data[0] = 5.0
    row = layer_ratios(layer)[0]
    assert row.selected == ('IN', None)
    assert not row.mean_fixed


def test_model_without_such_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert layer_ratios(model) == []
    assert layer_ratios_of_state(model.state_dict()) == []


@pytest.mark.parametrize('radius', [0.0, 0.3, 0.6, 1.0])
def test_state_and_model_agree(radius):
    torch.manual_seed(1)
    model = nn.Sequential(
        OrderedDict(
            sn1=SSN(4),
            conv=nn.Conv2d(4, 6, 1),
            sn2=SSN(6, normalizers=('IN', 'LN'), radius=0.1),
            sn3=SN(6, normalizers=('IN', 'LN', 'BN', 'GN'), num_groups=2),
        )
    )
    for layer in (model.sn1, model.sn2, model.sn3):
        nn.init.normal_(layer.mean_weight)
        nn.init.normal_(layer.var_weight)
    set_radius(model, radius)
    rows = layer_ratios(model)
    assert layer_ratios_of_state(model.state_dict()) == rows
    layer = SSN(4)
    layer.load_state_dict(model.sn1.state_dict())
    expected = layer.mean_weight.detach().double()
    if not layer.mean_fixed:
        expected = reference.sparsestmax(expected, radius)
    assert rows[0].mean_ratios == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(('kind', 'using_bn'), [('SSN', True), ('SN', True), ('SN', False)])
def test_released_layouts(kind, using_bn):
    state = released_state(50, 4, kind=kind, using_bn=using_bn, undecided=0.3, radius=0.4)
    rows = layer_ratios_of_state(state)
    assert len(rows) == 53
    assert [row.layer for row in rows[:3]] == ['sn1', 'layer1.0.sn1', 'layer1.0.sn2']
    assert rows[0].normalizers == ('IN', 'LN', 'BN') if using_bn else ('IN', 'LN')
    assert rows[0].channels == 4
    assert rows[-1].channels == 128
    for row in rows:
        for statistic in ('mean', 'var'):
            control = state[f'{row.layer}.{statistic}_weight'].double()
            if kind == 'SN':
                expected = control.softmax(-1)
            elif getattr(row, f'{statistic}_fixed'):
                expected = control
            else:
                expected = reference.sparsestmax(control, 0.4)
            ratios = getattr(row, f'{statistic}_ratios')
            assert ratios == pytest.approx(expected.tolist(), abs=1e-6)
    frozen = sum(row.mean_fixed for row in rows)
    assert (20 < frozen < 50) if kind == 'SSN' else frozen == 0
    radius = float(torch.tensor(0.4)) if kind == 'SSN' else None
    assert {row.radius for row in rows} == {radius}


@pytest.mark.parametrize('track', [True, False])
def test_layers_without_affine_parameters(track):
    normalizers = ('IN', 'LN', 'BN') if track else ('IN', 'LN')
    model = nn.Sequential(
        SSN(4, affine=False, normalizers=normalizers), SN(4, affine=False, normalizers=normalizers)
    )
    rows = layer_ratios(model)
    if not track:  # nothing in the file has the size of the channels
        rows = [row._replace(channels=None) for row in rows]
    assert layer_ratios_of_state(model.state_dict()) == rows
    assert 'None' not in str(list(selection_table(rows, 'title').columns[1].cells))


def test_candidates_that_a_file_does_not_name():
    state = {f'sn.{k}': v for k, v in SSN(4, normalizers=('IN', 'BN')).state_dict().items()}
    assert layer_ratios_of_state(state)[0].normalizers == ('0', '1')
    named = layer_ratios_of_state(state, Candidates(configured={2: ('IN', 'BN')}))[0]
    assert named.normalizers == ('IN', 'BN')
