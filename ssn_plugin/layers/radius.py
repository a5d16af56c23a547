"""The radius of a whole model, and the freezing of what became one-hot."""

from collections import defaultdict

import torch
from torch import nn

from ssn_plugin.functional import check_radius, sparsestmax
from ssn_plugin.layers.frozen import hold, known_choices
from ssn_plugin.layers.ssn import SSN
from ssn_plugin.ops.switchable_norm.ratios import UNKNOWN, largest


@torch.no_grad()
def set_radius(model: nn.Module, radius: float) -> None:
    """Set the radius of every SSN of a model and freeze the ratios that became one-hot.

    Mean and variance freeze independently: the control parameters become the one-hot vector,
    ``mean_fixed`` or ``var_fixed`` turns to 1, and no later radius changes them. A layer whose
    control parameters require no gradient (a frozen stage) keeps its radius and its ratios.

    The whole model costs one synchronisation with the device.

    Args:
        model: Any module.
        radius: At least 0. From ``sqrt((K - 1) / K)`` on, every layer is one-hot.

    Raises:
        ValueError: If ``radius`` is negative, NaN or no number, or control parameters are spread
            over processes.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN, set_radius
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8))
        >>> set_radius(model, 0.3)
        >>> model[1].selected
        (None, None)
        >>> set_radius(model, 1.0)
        >>> int(model[1].mean_fixed)
        1
    """
    radius = check_radius(radius)
    # Layers of one candidate count on one device are projected together.
    alike = defaultdict(list)
    for module in model.modules():
        if isinstance(module, SSN) and module.mean_weight.requires_grad:
            _check_whole(module)
            module.radius.fill_(radius)
            alike[module.mean_weight.device, len(module.normalizers)].append(module)
    for layers in alike.values():
        control = torch.stack([torch.stack((m.mean_weight, m.var_weight)) for m in layers])
        fixed = torch.stack([torch.stack((m.mean_fixed, m.var_fixed)) for m in layers]) > 0
        choice = torch.stack([torch.stack((m.mean_choice, m.var_choice)) for m in layers])
        choice = torch.where(choice == UNKNOWN, largest(control).squeeze(-1), choice)
        ratios = sparsestmax(control, radius)
        fresh = (ratios.amax(-1) == 1) & ~fixed
        choice = torch.where(fresh, ratios.argmax(-1), choice)
        found = torch.stack((fixed, fresh, choice), -1).tolist()
        for module, statistics in zip(layers, found, strict=True):
            choices = {}
            for name, (is_fixed, became_one_hot, index) in zip(
                ('mean', 'var'), statistics, strict=True
            ):
                if became_one_hot:
                    module.freeze(name, index)
                if is_fixed or became_one_hot:
                    choices[name] = index
            if tuple(map(choices.get, ('mean', 'var'))) != known_choices(module):
                hold(module, choices)


def _check_whole(layer: SSN) -> None:
    size = len(layer.normalizers)
    for name in ('mean_weight', 'var_weight'):
        parameter = getattr(layer, name)
        # FSDP leaves a piece of it, or a DTensor.
        if parameter.shape != (size,) or hasattr(parameter, 'placements'):
            raise ValueError(
                f'{name}: got {type(parameter.data).__name__} of shape {tuple(parameter.shape)}, '
                f'expected shape ({size},) in every process; keep the parameters of SSN layers out '
                'of FSDP (docs/distributed.md has the recipe)'
            )


@torch.no_grad()
def copy_selection(source: nn.Module, target: nn.Module) -> None:
    """Copy radius and frozen selections to a model of the same structure, an average of it for one.

    Args:
        source: The trained model.
        target: The model to follow it.

    Example:
        >>> import copy, torch
        >>> from ssn_plugin import SSN, copy_selection, set_radius
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8))
        >>> averaged = copy.deepcopy(model)
        >>> set_radius(model, 1.0)
        >>> copy_selection(model, averaged)
        >>> averaged[1].selected
        ('BN', 'BN')
    """
    followers = dict(target.named_modules())
    for name, layer in source.named_modules():
        if isinstance(layer, SSN):
            for buffer in ('radius', 'mean_fixed', 'var_fixed', 'mean_choice', 'var_choice'):
                getattr(followers[name], buffer).copy_(getattr(layer, buffer))
            mean, var = known_choices(layer)
            choices = {} if mean is None else {'mean': mean}
            hold(followers[name], choices if var is None else {**choices, 'var': var})


def undecided_layers(model: nn.Module) -> list[str]:
    """Names of the SSN layers whose mean or variance ratios are not one-hot.

    Args:
        model: Any module.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN, undecided_layers
        >>> undecided_layers(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8)))
        ['1']
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, SSN) and None in module.selected
    ]
