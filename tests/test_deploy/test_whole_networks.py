"""Collapsing whole networks: Mask R-CNN's features and DeepLabV3+'s logits stay what they were."""

import copy

import pytest
import torch
from decided_models import decided_model, demo_config, network_outputs, relative_difference

from ssn_plugin import SSN, collapse_ssn
from ssn_plugin.deploy.collapse import choices_of

ALL = ('IN', 'LN', 'BN', 'GN')


def networks(scope: str, **norm_cfg):
    model = decided_model(demo_config(scope, normalizers=ALL, num_groups=8, **norm_cfg))
    return model, choices_of(model)


@torch.no_grad()
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('correction', [0, 1])
def test_outputs_stay(scope, correction):
    model, choices = networks(scope, correction=correction)
    means, variances = zip(*choices.values(), strict=True)
    assert set(means) == set(variances) == set(ALL)
    assert any(mean == var for mean, var in choices.values())
    collapsed = collapse_ssn(copy.deepcopy(model))
    assert not [layer for layer in collapsed.modules() if isinstance(layer, SSN)]
    x = torch.randn(2, 3, 96, 128)
    expected = network_outputs(model, x)
    assert min(float(y.abs().max()) for y in expected) > 1e-2
    assert relative_difference(network_outputs(collapsed, x), expected) < 1e-5
    double = network_outputs(copy.deepcopy(model).double(), x.double())
    assert relative_difference(network_outputs(collapsed.double(), x.double()), double) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_native_differs(scope):
    # Or the test above would not see what it is about.
    model, _ = networks(scope, correction=1)
    collapsed = collapse_ssn(copy.deepcopy(model), native=True)
    x = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    expected = network_outputs(model.double(), x)
    assert relative_difference(network_outputs(collapsed.double(), x), expected) > 1e-6
