"""Parameters and FLOPs of a model, by mmengine's counter."""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.logging import MMLogger
from torch import nn

from ssn_plugin.deploy.constant_ratios import ConstantRatioNorm
from ssn_plugin.deploy.quiet import quiet
from ssn_plugin.layers.plain_norms import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from ssn_plugin.layers.selected_norm import SelectedNorm
from ssn_plugin.layers.switchable import SwitchableNorm

# Of these the counter sees operators that it does not count.
_COUNTED_HERE = (SwitchableNorm, SelectedNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d)


class Complexity(NamedTuple):
    """Size of a model.

    Attributes:
        params: Number of parameters.
        flops: Of one image; a multiplication with its addition is one.
    """

    params: int
    flops: int


@torch.no_grad()
def complexity_of(model: nn.Module, batch: dict) -> Complexity:
    """Count by ``mmengine.analysis.get_model_complexity_info``, as the frameworks' own tools do.

    It counts convolutions, matrix products and torch's normalization layers: 5 per number for
    statistics of the input, 2 for batch norm in evaluation, one less without weight and bias. Of
    SSN, SN, SelectedNorm and our InstanceNorm it sees operators that it does not count, so they are
    counted here at the same rates. Activations, additions, pooling and what follows the network
    (non-maximum suppression, drawing of masks) it leaves out.
    """
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    with _counted_norms(model) as counts, quiet(MMLogger.get_current_instance()):
        model.forward = partial(model.forward, data_samples=data['data_samples'])
        try:
            info = get_model_complexity_info(
                model, inputs=(data['inputs'],), show_table=False, show_arch=False
            )
        finally:
            del model.forward
    return Complexity(int(info['params']), int(info['flops']) + counts.total())


@contextlib.contextmanager
def _counted_norms(model: nn.Module) -> Iterator[Counter]:
    """FLOPs of the switchable layers in the last forward pass; the counter makes several."""
    counts: Counter = Counter()
    hooks = [model.register_forward_pre_hook(lambda *_: counts.clear())]
    for name, layer in model.named_modules():
        if isinstance(layer, _COUNTED_HERE):
            rate = (5 if _reads_statistics(layer) else 2) - (not layer.affine)

            def count(_, inputs: tuple, name: str = name, rate: int = rate) -> None:
                counts[name] += rate * int(inputs[0].numel())

            hooks.append(layer.register_forward_pre_hook(count))
    traced = [layer for layer in model.modules() if isinstance(layer, SwitchableNorm)]
    for layer in traced:
        layer.forward = ConstantRatioNorm(layer).forward  # in operators that can be traced
    try:
        yield counts
    finally:
        for layer in traced:
            del layer.forward
        for hook in hooks:
            hook.remove()


def _reads_statistics(layer: nn.Module) -> bool:
    """Whether a layer needs statistics of its input in evaluation."""
    if isinstance(layer, SwitchableNorm):
        chosen = layer.selected
    elif isinstance(layer, SelectedNorm):
        chosen = (layer.mean_source, layer.var_source)
    else:
        chosen = ('IN',)
    return not layer.track_running_stats or any(name != 'BN' for name in chosen)
