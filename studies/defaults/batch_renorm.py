"""SSN whose BatchNorm is corrected toward its running statistics in training: a lever tried here.

It is written in plain operators for these runs and is no part of the package.
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor

from ssn_plugin import SSN
from ssn_plugin.ops.switchable_norm.exportable import switchable_norm
from ssn_plugin.ops.switchable_norm.ratios import ratio_tensors
from ssn_plugin.ops.switchable_norm.statistics import Moments


@MODELS.register_module()
class BatchRenormSSN(SSN):
    r"""SSN with batch renormalisation in the place of BatchNorm.

    In training, BN's normalised value is :math:`\frac{x - \mu_B}{\sigma_B} r + d` with

    .. math::
        r = \mathrm{clip}(\sigma_B / \sigma, 1 / r_{max}, r_{max}),\quad
        d = \mathrm{clip}((\mu_B - \mu) / \sigma, -d_{max}, d_{max})

    of batch (B) and running statistics, both constants for the gradient. So BN takes part in the
    mixture with the mean :math:`\mu_B - d \sigma_B / r` and the deviation :math:`\sigma_B / r`.
    The limits grow from 1 and 0 to 3 and 5, so the first batches see BatchNorm.

    Args:
        num_features: C, the number of channels.
        warm_up: Batches after which the limits have grown.
        **kwargs: Arguments of :class:`ssn_plugin.SSN`.

    Source:
        Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
        Models", NIPS 2017.
    """

    def __init__(self, num_features: int, warm_up: int = 1000, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        self.warm_up = warm_up

    def forward(self, x: Tensor) -> Tensor:
        """Normalise.

        Args:
            x: Shape (N, C, ...).
        """
        selected = self.selected
        if not self.training or not {None, 'BN'} & set(selected):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        given = self._renormalised(x)
        mean, var = (
            ratios if choice is None else [float(name == choice) for name in self.normalizers]
            for ratios, choice in zip(ratio_tensors(self._control()), selected, strict=True)
        )
        return switchable_norm(x, mean, var, self.weight, self.bias, given, self._settings())

    def _renormalised(self, x: Tensor) -> Moments:
        """Mean and variance that BN normalises by; the running ones are updated."""
        rows = x.flatten(2)
        mean, var = rows.mean((0, 2)), rows.var((0, 2), correction=0)
        std = torch.sqrt(var + self.eps)
        with torch.no_grad():
            progress = min(int(self.num_batches_tracked) / self.warm_up, 1.0)
            widest, farthest = 1.0 + 2.0 * progress, 5.0 * progress
            running_std = torch.sqrt(self.running_var + self.eps)
            r = (std / running_std).clamp(1 / widest, widest)
            d = ((mean - self.running_mean) / running_std).clamp(-farthest, farthest)
            count = rows.numel() // rows.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)
        return Moments(mean - d * std / r, (std / r).square() - self.eps)
