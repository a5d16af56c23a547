"""A model of any codebase in a few steps of training, then decided and collapsed."""

import copy

import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from ssn_plugin import SSN, collapse_ssn, radius_at, set_radius, undecided_layers


def train(model: nn.Module, batch: dict, steps: int) -> list[dict[str, torch.Tensor]]:
    """Losses of some steps on one batch, at the end of which every layer is decided."""
    optimizer = dict(type='Adam', lr=1e-3)
    wrapper = build_optim_wrapper(
        model, dict(optimizer=optimizer, constructor='SSNOptimWrapperConstructor')
    )
    losses = []
    for step in range(steps):
        set_radius(model, radius_at(step / steps, end=0.5))
        losses.append(model.train_step(copy.deepcopy(batch), wrapper))
    assert undecided_layers(model) == []
    return losses


def check_collapse(model: nn.Module, batch: dict) -> None:
    """The collapsed model puts out what the decided one does."""
    model.eval()
    collapsed = collapse_ssn(copy.deepcopy(model))
    assert not [module for module in collapsed.modules() if isinstance(module, SSN)]
    found, expected = (output(each, batch) for each in (collapsed, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def output(model: nn.Module, batch: dict) -> object:
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    return model(data['inputs'], data['data_samples'], mode='tensor')
