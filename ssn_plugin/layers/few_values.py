"""Candidates for which a layer has too few values."""

import torch
import torch.distributed as dist
from torch import nn

from ssn_plugin.layers.ssn import SSN
from ssn_plugin.ops.switchable_norm.ratios import has_values

# So far below the others that the ratio is 0 until the layer is decided, and has no gradient. A
# distance of 0.5 is enough for that; the rest is for weight decay, which makes it smaller, and for
# averaged copies of the weights, which follow slowly.
_LEFT_OUT = 100.0


class FewValues:
    """Leaves candidates out of layers that have too few values per channel for them.

    'IN' and 'BN' take mean and variance of each channel alone: 'IN' over the pixels of a sample,
    'BN' over those of the batch. The image pooling of DeepLabV3+ has one pixel, so of one image
    'BN' has a single value, whose variance is 0, and of a few images an estimate that jumps from
    batch to batch. A layer that chooses it, which nothing in its loss speaks against, spoils what
    the others learn.

    Construct it before a forward pass in training; call :meth:`leave_out` after it. A candidate
    whose largest count in that pass is below ``least`` gets ratios of zero, unless no other would
    be left. Of one process and of several the largest count decides, so that all do the same.
    Layers that no pass has reached and frozen ones wait for a later call. Layers that have begun to
    choose are left alone, and those inside compiled graphs.

    Args:
        model: Any module.
        least: Number of values per channel that a candidate needs.

    Attributes:
        layers: Those that wait, by name.

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
        """Take the ratios away, in layers that do not have to wait.

        Returns:
            Name of each layer that lost candidates -> these.
        """
        seen = [layer.values_seen for layer in self.layers.values()]
        if self.layers and dist.is_available() and dist.is_initialized():
            device = next(iter(self.layers.values())).radius.device
            counts = torch.tensor(seen, device=device)
            dist.all_reduce(counts, dist.ReduceOp.MAX)
            seen = counts.tolist()
        left_out = {}
        for (place, layer), (pixels, values) in zip(list(self.layers.items()), seen, strict=True):
            if not values or not _learns(layer):
                continue
            del self.layers[place]
            layer.values_seen = None
            enough = {'IN': pixels >= self.least, 'BN': values >= self.least}
            few = [k for k, name in enumerate(layer.normalizers) if not enough.get(name, True)]
            pairs = zip((layer.mean_weight, layer.var_weight), layer.selected, strict=True)
            undecided = [control for control, selected in pairs if selected is None]
            if few and undecided and len(few) < len(layer.normalizers):
                left_out[place] = [layer.normalizers[k] for k in few]
                for control in undecided:
                    control[few] = control.min() - _LEFT_OUT
        return left_out

    def unreached(self) -> list[str]:
        """Names of the layers that learn and wait all the same."""
        return [name for name, layer in self.layers.items() if _learns(layer)]


def _learns(layer: SSN) -> bool:
    return layer.mean_weight.requires_grad and layer.var_weight.requires_grad


def _has_yet_to_choose(layer: SSN) -> bool:
    """Whether its ratios are equal still."""
    controls = layer._tensor('mean_weight'), layer._tensor('var_weight')
    if not all(type(control) is nn.Parameter for control in controls):
        return False
    if not has_values(*controls) or layer.selected != (None, None):
        return False
    return all(len(c) == len(layer.normalizers) and bool((c == c[0]).all()) for c in controls)
