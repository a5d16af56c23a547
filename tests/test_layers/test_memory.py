"""What is kept for backward: in bytes beside nn.BatchNorm2d."""

import itertools

import pytest
import torch
from torch import nn

from ssn_plugin import SN, SSN, set_radius

NORMALIZERS = ('IN', 'LN', 'BN')
# 1 MB and more in float32 and in bfloat16: long rows, short rows, very short rows, few channels.
SHAPES = [(2, 64, 100, 84), (32, 256, 14, 14), (64, 256, 7, 7), (2, 8, 256, 256), (1024, 512, 1, 1)]
STATES = ['undecided', 'on a face', 'half', *itertools.product(NORMALIZERS, repeat=2), 'SN']


def layer_in(state, channels: int) -> nn.Module:
    if state == 'SN':
        return SN(channels)
    layer = SSN(channels)
    with torch.no_grad():
        if state == 'undecided':
            layer.mean_weight.copy_(torch.tensor([0.02, 0.0, -0.01]))
            layer.var_weight.copy_(torch.tensor([0.0, 0.01, 0.03]))
            set_radius(layer, 0.2)
        elif state == 'on a face':
            layer.mean_weight.copy_(torch.tensor([0.2, 0.1, -0.3]))
            layer.var_weight.copy_(torch.tensor([-0.3, 0.2, 0.1]))
            set_radius(layer, 0.5)
        else:
            first, second = ('LN', None) if state == 'half' else state
            layer.mean_weight[NORMALIZERS.index(first)] = 2
            if second is not None:
                layer.var_weight[NORMALIZERS.index(second)] = 2
            set_radius(layer, 0.1)
    return layer


def kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages that one call keeps for backward."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('state', STATES, ids=str)
def test_at_most_two_percent_beside_batch_norm(state, dtype, memory_format, training):
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        assert x.numel() * x.element_size() >= 2**20
        norm = nn.BatchNorm2d(shape[1]).train(training)
        found, theirs = (
            kept_bytes(layer.train(training), x) for layer in (layer_in(state, shape[1]), norm)
        )
        assert x.numel() * x.element_size() <= theirs
        assert found <= 1.02 * theirs, f'{shape}: {found / theirs:.4f}'
