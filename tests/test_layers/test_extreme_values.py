"""Very large input: right as far as squares fit into float32; beyond, what torch's layers give."""

import pytest
import torch
from torch import nn

from ssn_plugin import SN, SSN, SelectedNorm

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
C, GROUPS = 8, 4
SHAPES = [(6, C), (3, C, 5), (2, C, 7, 9), (2, C, 40, 50)]


def layer_of(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    if kind == 'SelectedNorm':
        return SelectedNorm(C, 'LN', 'BN', num_groups=GROUPS, **settings)
    made = (SN if kind == 'SN' else SSN)(C, normalizers=NORMALIZERS, num_groups=GROUPS, **settings)
    if kind in NORMALIZERS:
        made.select(kind, kind)
    return made


def run(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape))
    return y.detach(), x.grad


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('kind', ['SSN', 'SN', 'SelectedNorm', *NORMALIZERS])
def test_the_size_of_the_input_does_not_matter(kind, shape, channels_last):
    if len(shape) == 2 and kind == 'IN':
        pytest.skip('every value is its own mean, and nothing but the bias is left')
    if len(shape) == 2 and kind == 'SSN':
        pytest.skip("an undecided layer with 'IN' refuses it")
    torch.manual_seed(2)
    x = torch.randn(shape)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    y, dx = run(layer_of(kind, eps=1e-30), x)
    scale = 1e12
    large, dlarge = run(layer_of(kind, eps=1e-30), x * scale)
    torch.testing.assert_close(large, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        dlarge * scale, dx, rtol=1e-3, atol=5e-3 * max(1, dx.abs().max().item())
    )


@pytest.mark.parametrize('value', [1e25, float('inf'), float('nan')])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('kind', ['SSN', 'SN', 'SelectedNorm', *NORMALIZERS])
def test_what_leaves_float32_raises_nothing(kind, shape, value):
    layer = layer_of(kind)
    x = torch.randn(shape)
    x[0, 0] = value
    run(layer.train(kind != 'SSN' or x.dim() > 2), x)
    layer.eval()(x)


def test_what_is_not_finite_stays_so():
    for value in (float('nan'), float('inf')):
        for kind in ('SSN', *NORMALIZERS):
            x = torch.randn(2, C, 5, 5)
            x[0, 0, 0, 0] = value
            layer = layer_of(kind)
            assert not bool(layer(x)[0, 0, 0, 0].isfinite())
