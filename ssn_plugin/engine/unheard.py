"""Settings of a backbone that reach BatchNorm alone, and so do nothing to SSN."""

from collections.abc import Iterator

from torch import nn

from ssn_plugin.layers.switchable import SwitchableNorm

# Arguments of OpenMMLab's backbones that freeze running statistics.
_SETTINGS = ('norm_eval', 'partial_bn')


def unheard_settings(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Name of a module, its setting, and how many SSN and SN layers stay in training all the same.

    The model is put into training mode, as a training loop does before its first step.
    """
    model.train()
    for name, module in model.named_modules():
        for setting in _SETTINGS:
            if getattr(module, setting, False) is True:
                layers = (m for m in module.modules() if isinstance(m, SwitchableNorm))
                count = sum(layer.training for layer in layers)
                if count:
                    yield name, setting, count
