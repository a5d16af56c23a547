"""SSN written down from the formulas, with plain autograd: what the layer costs without care.

Three pairs of statistics, each a chain of differentiable operations on (N, C, H, W) or (N, C, 1)
tensors, mixed and applied one after the other. The instance variance is ``torch.var`` and the other
two follow from E[x^2] - E[x]^2 of the instance moments, as in the authors' release.
"""

import torch
from torch import Tensor, nn

from ssn_plugin.ops.reference import sparsestmax


class StraightforwardSSN(nn.Module):
    """SSN of (N, C, H, W) with the candidates IN, LN, BN.

    Args:
        channels: C.
        radius: Radius of the circle.
    """

    def __init__(self, channels: int, radius: float = 0.3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.mean_weight = nn.Parameter(torch.tensor([0.1, 0.0, 0.2]))
        self.var_weight = nn.Parameter(torch.tensor([0.0, 0.2, 0.1]))
        self.register_buffer('running_mean', torch.zeros(1, channels, 1))
        self.register_buffer('running_var', torch.ones(1, channels, 1))
        self.radius = radius

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the statistics of the batch.

        Args:
            x: Shape (N, C, H, W).
        """
        shape = x.shape
        x = x.view(shape[0], shape[1], -1)
        mean_in = x.mean(-1, keepdim=True)
        var_in = x.var(-1, keepdim=True, correction=0)
        square = var_in + mean_in**2
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = square.mean(1, keepdim=True) - mean_ln**2
        mean_bn = mean_in.mean(0, keepdim=True)
        var_bn = square.mean(0, keepdim=True) - mean_bn**2
        with torch.no_grad():
            self.running_mean.mul_(0.9).add_(mean_bn, alpha=0.1)
            self.running_var.mul_(0.9).add_(var_bn, alpha=0.1)
        p = sparsestmax(self.mean_weight, self.radius)
        q = sparsestmax(self.var_weight, self.radius)
        mean = p[0] * mean_in + p[1] * mean_ln + p[2] * mean_bn
        var = q[0] * var_in + q[1] * var_ln + q[2] * var_bn
        x = (x - mean) / (var + 1e-5).sqrt()
        return x.view(shape) * self.weight + self.bias
