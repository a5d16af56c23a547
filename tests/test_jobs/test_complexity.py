"""Parameters and FLOPs against sums by hand."""

import torch
from mmengine.model import BaseModel
from torch import nn

from ssn_plugin import SSN, collapse_ssn
from ssn_plugin.jobs.complexity import complexity_of

PIXELS = 6 * 6


class Net(BaseModel):
    """A convolution, and norms that are called once or twice."""

    def __init__(self, *norms: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norms = nn.ModuleList(norms)

    def forward(self, inputs, data_samples, mode='tensor'):
        x = self.conv(inputs)
        for norm in self.norms:
            x = norm(norm(x))
        return x


def decided(mean: str, var: str, **settings) -> SSN:
    layer = SSN(4, **settings)
    layer.select(mean, var)
    return layer


def count(*norms: nn.Module):
    model = Net(*norms).eval()
    found = complexity_of(model, dict(inputs=torch.randn(1, 3, 8, 8), data_samples=None))
    assert 'forward' not in vars(model)
    assert not [m for m in model.modules() if m._forward_pre_hooks or 'forward' in vars(m)]
    return found


def test_switchable_layers_count_as_torch_layers():
    conv = 4 * 3 * 9
    values = 2 * 4 * PIXELS  # of two calls
    alone = count()
    assert alone == (conv, conv * PIXELS)
    for norm, rate in (
        (SSN(4), 5),
        (decided('BN', 'BN'), 2),
        (decided('LN', 'LN'), 5),
        (decided('BN', 'LN'), 5),
        (decided('IN', 'IN'), 5),
        (decided('IN', 'IN', affine=False), 4),
        (decided('BN', 'BN', affine=False), 1),
        (decided('LN', 'IN', affine=False), 4),
        (decided('BN', 'BN', track_running_stats=False), 5),
    ):
        found = count(norm)
        assert found.flops == conv * PIXELS + rate * values
        assert found.params == conv + (14 if norm.affine else 6)
        after = count(collapse_ssn(norm, keep_undecided=True))
        assert after.flops == found.flops
        assert after.params == conv + 8 * norm.affine + 6 * (norm.selected[0] is None)
