"""Rows of what a model chose."""

import pytest
from torch import nn

from ssn_plugin import SN, SSN, set_radius
from ssn_plugin.analysis.importance_ratios import importance_ratios


def test_one_row_per_layer_in_order():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), SSN(4), nn.ReLU(), SN(4, normalizers=('IN', 'LN')))
    rows = importance_ratios(model)
    assert [row.layer for row in rows] == ['1', '3']
    assert rows[0].normalizers == ('IN', 'LN', 'BN')
    assert rows[0].mean_ratios == pytest.approx((1 / 3,) * 3)
    assert rows[1].var_ratios == (0.5, 0.5)
    assert not rows[0].decided


def test_decided_needs_mean_and_variance():
    layer = SSN(4)
    layer.mean_weight.data[0] = 5.0
    set_radius(layer, 0.0)
    assert not importance_ratios(layer)[0].decided
    set_radius(layer, 1.0)
    row = importance_ratios(layer)[0]
    assert row.decided
    assert row.mean_ratios == (1, 0, 0)
    assert row.var_ratios == (0, 0, 1)
