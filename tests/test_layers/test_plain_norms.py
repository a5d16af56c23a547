"""BatchNorm and InstanceNorm for every input that SSN takes: torch's own, where that takes it."""

import pytest
import torch
from torch import nn

from ssn_plugin.layers.plain_norms import (
    BatchNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
)

SHAPES = {3: (4, 6, 7), 4: (4, 6, 5, 7), 5: (2, 6, 3, 4, 5)}
TORCH = {
    3: (nn.BatchNorm1d, nn.InstanceNorm1d),
    4: (nn.BatchNorm2d, nn.InstanceNorm2d),
    5: (nn.BatchNorm3d, nn.InstanceNorm3d),
}


def randomised(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize('dims', SHAPES)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_instance_norm_is_that_of_torch(dims, memory_format):
    if memory_format is torch.channels_last and dims != 4:
        pytest.skip('channels_last is 4-D')
    x = torch.randn(SHAPES[dims]).to(memory_format=memory_format)
    theirs = randomised(TORCH[dims][1](6, eps=1e-3, affine=True))
    own = (InstanceNorm1d, InstanceNorm2d, InstanceNorm3d)[dims - 3]
    for kind in (own, InstanceNorm2d):
        ours = kind(6, eps=1e-3, affine=True)
        ours.load_state_dict(theirs.state_dict())
        assert isinstance(own(6), TORCH[dims][1])
        found = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            torch.manual_seed(1)
            y.backward(torch.randn_like(y))
            found.append((y.detach(), leaf.grad))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(3, 6), (3, 6, 1), (3, 6, 1, 1), (1, 6, 1, 1, 1)])
@pytest.mark.parametrize('affine', [True, False])
def test_a_row_of_one_element_is_its_mean(shape, affine):
    layer = InstanceNorm2d(6, affine=affine)
    x = torch.randn(shape, requires_grad=True)
    if affine:
        randomised(layer)
    y = layer(x)
    bias = layer.bias if affine else torch.zeros(6)
    assert torch.equal(y, bias.view(1, 6, *(1,) * (len(shape) - 2)).expand(shape))
    y.backward(torch.randn_like(y))
    assert not x.grad.any()
    if affine:
        assert not layer.weight.grad.any()  # not None: distributed training asks for all
    assert layer(x.bfloat16()).dtype == torch.bfloat16  # as SSN under autocast


@pytest.mark.parametrize('dims', SHAPES)
def test_batch_norm_is_that_of_torch(dims):
    x = torch.randn(SHAPES[dims])
    ours, theirs = BatchNorm(6), TORCH[dims][0](6)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
        ours.eval(), theirs.eval()
    assert BatchNorm(6)(torch.randn(4, 6)).shape == (4, 6)


@pytest.mark.parametrize('layer', [BatchNorm(6), InstanceNorm2d(6)])
@pytest.mark.parametrize('shape', [(6,), (2, 6, 3, 3, 3, 3)])
def test_wrong_dimensions(layer, shape):
    with pytest.raises(ValueError, match='x: got shape'):
        layer(torch.randn(shape))


def test_instance_norm_takes_its_channels_only():
    # torch's own would take (C, H, W) for one sample.
    with pytest.raises(RuntimeError, match='number of channels'):
        InstanceNorm2d(6)(torch.randn(6, 4, 5))
