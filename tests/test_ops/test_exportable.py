"""The evaluation pass for recorders: equal to the formulas in float64, for every mixture."""

import pytest
import torch

from ssn_plugin.ops import reference
from ssn_plugin.ops.switchable_norm.exportable import switchable_norm
from ssn_plugin.ops.switchable_norm.statistics import Moments, Settings

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
CHANNELS, GROUPS = 6, 3
RATIOS = {
    'mixture': ([0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2]),
    'IN': ([1.0, 0.0, 0.0, 0.0],) * 2,
    'LN': ([0.0, 1.0, 0.0, 0.0],) * 2,
    'BN': ([0.0, 0.0, 1.0, 0.0],) * 2,
    'GN': ([0.0, 0.0, 0.0, 1.0],) * 2,
    'BN/IN': ([0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
    'LN/BN': ([0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]),
}


@pytest.mark.parametrize('shape', [(4, CHANNELS), (3, CHANNELS, 1, 1), (2, CHANNELS, 5, 7)])
@pytest.mark.parametrize('ratios', RATIOS)
@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('tracks', [True, False])
def test_equals_the_formulas(shape, ratios, correction, tracks):
    x = torch.randn(shape, dtype=torch.float64) + 3
    weight, bias, mean = torch.randn(3, CHANNELS, dtype=torch.float64)
    var = torch.rand(CHANNELS, dtype=torch.float64) + 0.5
    running = (mean, var) if tracks else (None, None)
    settings = Settings(NORMALIZERS, GROUPS, correction, 1e-3)
    given = Moments(*running) if running[0] is not None else None
    y = switchable_norm(x, *RATIOS[ratios], weight, bias, given, settings)
    expected = reference.switchable_norm(
        x,
        *map(x.new_tensor, RATIOS[ratios]),
        weight,
        bias,
        NORMALIZERS,
        GROUPS,
        correction,
        1e-3,
        *running,
    )
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_half_precision_is_computed_in_float32(dtype, tolerance):
    x = (torch.randn(2, CHANNELS, 5, 7) + 30).to(dtype)
    settings = Settings(NORMALIZERS, GROUPS, 0, 1e-5)
    arguments = (*RATIOS['mixture'], None, None, None, settings)
    y = switchable_norm(x, *arguments)
    assert y.dtype == dtype
    expected = switchable_norm(x.float(), *arguments)
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
