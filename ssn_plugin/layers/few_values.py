"""Candidates for which a layer has too few values."""

import torch
import torch.distributed as dist
from torch import nn

from ssn_plugin.layers.ssn import SSN
from ssn_plugin.ops.switchable_norm.ratios import has_values

# So far below the others that the ratio is 0 until the layer is decided, and has no gradient.
_LEFT_OUT = 2.0


class FewValues:
    """Leaves candidates out of layers that have too few values per channel for them.

    'IN' and 'BN' take mean and variance of each channel alone: 'IN' over the pixels of a sample,
    'BN' over those of the batch. The image pooling of DeepLabV3+ has one pixel, so of one image
    'BN' has a single value, whose variance is 0, and of a few images an estimate that jumps from
    batch to batch. A layer that chooses it, which nothing in its loss speaks against, spoils what
    the others learn.

    Construct it before a forward pass in training; call :meth:`leave_out` after it. A candidate
    whose largest count in that pass is below ``least`` gets ratios of zero, unless it is the only
    one. Of one process and of several the largest count decides, so that all do the same. Layers
    that have begun to choose are left alone, and those inside compiled graphs.

    Args:
        model: Any module.
        least: Number of values per channel that a candidate needs.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN
        >>> from ssn_plugin.layers.few_values import FewValues
        >>> layer = SSN(8, normalizers=('LN', 'BN'))
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), layer)
        >>> few = FewValues(model, least=16)
        >>> model(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 1, 1])
        >>> few.leave_out()
        {'1': ['BN']}
        >>> layer.mean_ratios.tolist()
        [1.0, 0.0]
    """

    def __init__(self, model: nn.Module, least: int) -> None:
        self.least = least
        self.layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, SSN) and _has_yet_to_choose(layer)
        }
        for layer in self.layers.values():
            layer.values_seen = (0, 0)

    @torch.no_grad()
    def leave_out(self) -> dict[str, list[str]]:
        """Take the ratios away.

        Returns:
            Name of each layer that lost candidates -> these.
        """
        seen = [layer.values_seen for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.values_seen = None
        if self.layers and dist.is_available() and dist.is_initialized():
            device = next(iter(self.layers.values())).radius.device
            counts = torch.tensor(seen, device=device)
            dist.all_reduce(counts, dist.ReduceOp.MAX)
            seen = counts.tolist()
        left_out = {}
        for (name, layer), (pixels, values) in zip(self.layers.items(), seen, strict=True):
            counts = {'IN': pixels, 'BN': values}
            few = [n for n in layer.normalizers if 0 < counts.get(n, 0) < self.least]
            if few and len(few) < len(layer.normalizers):
                left_out[name] = few
                indices = [layer.normalizers.index(candidate) for candidate in few]
                for control in (layer.mean_weight, layer.var_weight):
                    control[indices] = control.min() - _LEFT_OUT
        return left_out


def _has_yet_to_choose(layer: SSN) -> bool:
    """Whether its ratios are learned and equal still."""
    controls = layer._tensor('mean_weight'), layer._tensor('var_weight')
    if not all(type(control) is nn.Parameter and control.requires_grad for control in controls):
        return False
    if not has_values(*controls) or layer.selected != (None, None):
        return False
    return all(len(c) == len(layer.normalizers) and bool((c == c[0]).all()) for c in controls)
