"""Detectors and segmenters as they are shipped, from a training step to a folded network."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from network_zoo import DETECTORS, SEGMENTERS, batch_for, network

from ssn_plugin import (
    SSN,
    collapse_ssn,
    find_foldable,
    fold_batch_norms,
    set_radius,
    undecided_layers,
)
from ssn_plugin.jobs.collapse import FOLD_TOLERANCE, TOLERANCE
from ssn_plugin.jobs.complexity import complexity_of
from ssn_plugin.jobs.output_comparison import compare_outputs


def train_step(model: nn.Module, name: str, truth: bool) -> float:
    """One step of SGD, by the loss that the network itself defines."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    data = model.data_preprocessor(batch_for(name, truth), True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    if loss.requires_grad:  # of some there is none without anything to learn
        loss.backward()
    optimizer.step()
    return float(loss.detach())


def prefer(layers: list[SSN]) -> None:
    """Control parameters by which the layers will choose one after the other of these."""
    pairs = itertools.cycle([('BN', 'BN'), ('LN', 'BN'), ('BN', 'BN'), ('IN', 'IN'), ('LN', 'LN')])
    for layer, pair in zip(layers, pairs, strict=False):
        for control, name in zip((layer.mean_weight, layer.var_weight), pair, strict=True):
            control.data[layer.normalizers.index(name)] += 0.3


@pytest.mark.slow
@pytest.mark.parametrize('name', [*DETECTORS, *SEGMENTERS])
def test_from_a_training_step_to_a_folded_network(name):
    model = network(name)
    layers = [module for module in model.modules() if isinstance(module, SSN)]
    assert len(layers) >= 5
    prefer(layers)
    for module in model.modules():
        if isinstance(module, SSN | _BatchNorm):
            module.momentum = 0.5  # or deep networks explode in evaluation
    set_radius(model, 0.2)
    assert math.isfinite(train_step(model, name, truth=True))
    learning = [layer for layer in layers if layer.weight.grad is not None]
    assert any(layer.mean_weight.grad.any() and layer.var_weight.grad.any() for layer in learning)
    model.eval().test_step(batch_for(name))

    set_radius(model, 1.0)
    assert undecided_layers(model) == []
    chosen = [layer.selected for layer in layers]
    assert len({*chosen}) > 1
    assert math.isfinite(train_step(model, name, truth=False))
    assert [layer.selected for layer in layers] == chosen

    model.eval()
    collapsed = collapse_ssn(copy.deepcopy(model))
    assert not any(isinstance(module, SSN) for module in collapsed.modules())
    batches = [batch_for(name)]
    batches[0] = {key: value[:1] for key, value in batches[0].items()}
    same = compare_outputs(model, model, batches)
    assert (same.largest, same.matched, same.left_out) == (0, same.boxes or 0, set())
    found = compare_outputs(model, collapsed, batches)
    assert found.largest <= TOLERANCE
    assert found.images == 1

    pairs = find_foldable(
        collapsed, lambda network: [network.test_step(copy.deepcopy(batch)) for batch in batches]
    )
    assert pairs
    folded = copy.deepcopy(collapsed)
    fold_batch_norms(folded, pairs)
    assert compare_outputs(model, folded, batches).largest <= FOLD_TOLERANCE
    assert complexity_of(folded, batches[0]).params < complexity_of(model, batches[0]).params
