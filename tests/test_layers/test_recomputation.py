"""Gradient checkpointing: one update of the running statistics per step, the same numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssn_plugin import SN, SSN, SelectedNorm, set_radius

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
# Radius and first control parameters: a mixture, on the circle, one-hot by sparsemax and not yet
# frozen, on each candidate frozen.
STATES = {
    'mixture': (0.0, (0.1, 0.0, -0.1, 0.05)),
    'on the circle': (0.4, (0.1, 0.0, -0.1, 0.05)),
    'two left': (0.7, (0.1, 0.0, -0.1, 0.05)),
    **{f'one-hot {n}': (None, tuple(2.0 * (n == m) for m in NORMALIZERS)) for n in NORMALIZERS},
    **{f'frozen {n}': (1.0, tuple(1.0 * (n == m) for m in NORMALIZERS)) for n in NORMALIZERS},
}


class Network(nn.Module):
    """Two norms, the second part checkpointed if asked for."""

    def __init__(self, norm, use_reentrant=None):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(6, 4, 3))

    def forward(self, x):
        x = self.first(x)
        if self.use_reentrant is None:
            return self.second(x)
        return checkpoint(self.second, x, use_reentrant=self.use_reentrant)


def networks(norm):
    plain = Network(norm)
    for use_reentrant in (False, True):
        other = copy.deepcopy(plain)
        other.use_reentrant = use_reentrant
        yield copy.deepcopy(plain), other


def step(model, x, upstream):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(upstream)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def same_step(model, other, x, upstream):
    for ours, theirs in zip(step(model, x, upstream), step(other, x, upstream), strict=True):
        assert torch.equal(ours, theirs)


def same_buffers(model, other):
    for name, buffer in other.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('state', STATES)
def test_same_bits_and_one_update_per_step(state, momentum):
    radius, control = STATES[state]
    norm = SSN(6, momentum=momentum, normalizers=NORMALIZERS, num_groups=3)
    with torch.no_grad():
        norm.mean_weight.copy_(torch.tensor(control))
        norm.var_weight.copy_(torch.tensor(control))
    if radius is not None:
        set_radius(norm, radius)
    for plain, checkpointed in networks(norm):
        for _ in range(3):
            x, upstream = torch.randn(4, 3, 9, 11) * 2 + 1, torch.randn(4, 4, 5, 7)
            same_step(checkpointed, plain, x, upstream)
        assert checkpointed.second[0].num_batches_tracked == 3
        same_buffers(checkpointed, plain)
        if 'frozen' not in state or 'BN' in state:
            assert plain.second[0].running_mean.abs().max() > 0


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('norm', [SSN(6), SN(6)], ids=['SSN', 'SN'])
def test_large_inputs_and_the_softmax_parent(norm, memory_format):
    """Large enough for the backward pass to read x once more."""
    for plain, checkpointed in networks(norm):
        x = torch.randn(2, 3, 210, 250).contiguous(memory_format=memory_format)
        upstream = torch.randn(2, 4, 206, 246)
        same_step(checkpointed, plain, x, upstream)
        same_buffers(checkpointed, plain)


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('pair', [('LN', 'BN'), ('BN', 'IN'), ('BN', 'BN')])
def test_what_a_decided_layer_collapses_to(pair, momentum):
    for plain, checkpointed in networks(SelectedNorm(6, *pair, momentum=momentum)):
        for _ in range(3):
            x, upstream = torch.randn(4, 3, 9, 11) * 2 + 1, torch.randn(4, 4, 5, 7)
            same_step(checkpointed, plain, x, upstream)
        assert checkpointed.second[0].num_batches_tracked == 3
        same_buffers(checkpointed, plain)
        assert plain.second[0].running_mean.abs().max() > 0


def test_batch_norm_of_torch_updates_twice():
    """What users of BatchNorm live with, and the reason for this file."""
    for plain, checkpointed in networks(nn.BatchNorm2d(6)):
        x, upstream = torch.randn(4, 3, 9, 11), torch.randn(4, 4, 5, 7)
        step(plain, x, upstream)
        step(checkpointed, x, upstream)
        assert plain.second[0].num_batches_tracked == 1
        assert checkpointed.second[0].num_batches_tracked == 2


def test_nested_checkpoints():
    def nested(model, x):
        def inner(y):
            return checkpoint(model.second, y, use_reentrant=False)

        return checkpoint(inner, model.first(x), use_reentrant=False)

    model = Network(SSN(6))
    plain = copy.deepcopy(model)
    x, upstream = torch.randn(4, 3, 9, 11), torch.randn(4, 4, 5, 7)
    nested(model, x).backward(upstream)
    plain(x).backward(upstream)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
