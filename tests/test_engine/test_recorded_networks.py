"""torch.jit.trace of whole collapsed networks holds for every size of input.

That torch.export of them does is seen where ONNX files of the same networks are made.
"""

import copy

import pytest
import torch
from decided_models import decided_model, demo_config, relative_difference
from since import EXPORT

from ssn_plugin import SSN, collapse_ssn, hold_ratios
from ssn_plugin.jobs.export import Features, Logits


@torch.no_grad()
@pytest.mark.slow
@EXPORT
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_demo_networks(scope):
    model = decided_model(demo_config(scope, correction=1))
    network = (Features if scope == 'mmdet' else Logits)(model).eval()
    undecided = next(layer for layer in network.modules() if isinstance(layer, SSN))
    undecided.reset_parameters()
    recorded = hold_ratios(collapse_ssn(copy.deepcopy(network), keep_undecided=True))
    assert not [layer for layer in recorded.modules() if isinstance(layer, SSN)]
    example = torch.randn(2, 3, 96, 128)
    traced = torch.jit.trace(recorded, example, check_trace=False)
    for shape in ((1, 3, 64, 64), (3, 3, 97, 161), (2, 3, 160, 96)):
        x = torch.randn(shape)
        assert relative_difference(traced(x), network(x)) < 1e-5
