"""The radius of a whole model, and what becomes of it: decided layers."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from ssn_plugin.functional import check_radius, sparsestmax
from ssn_plugin.layers.ssn import SSN
from ssn_plugin.ops.switchable_norm.ratios import UNKNOWN, largest


@torch.no_grad()
def set_radius(model: nn.Module, radius: float) -> None:
    """Set the radius of every SSN of a model and decide the ratios that became one-hot.

    Mean and variance are decided independently: ``mean_fixed`` or ``var_fixed`` turns to 1, and no
    later radius changes the ratios. A layer whose control parameters require no gradient (a frozen
    stage) keeps its radius and its ratios.

    The whole model costs one synchronisation with the device, and none once all is decided.

    Args:
        model: Any module.
        radius: At least 0. From ``sqrt((K - 1) / K)`` on, every layer is one-hot.

    Raises:
        ValueError: If ``radius`` is negative, NaN or no number, control parameters are spread over
            processes, or the model is on the meta device.

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
    # Layers of one number of candidates on one device are projected together.
    alike, radii = defaultdict(list), defaultdict(list)
    for layer in model.modules():
        if not isinstance(layer, SSN):
            continue
        control = layer.mean_weight
        if not control.requires_grad:
            continue
        radii[layer.radius.device].append(layer.radius)
        choices = layer.known_choices()
        if choices is None or None in choices:
            _check_whole(layer)
            alike[control.device, control.dtype, len(layer.normalizers)].append(layer)
    for buffers in radii.values():
        torch._foreach_zero_(buffers)
        torch._foreach_add_(buffers, radius)
    for layers in alike.values():
        _decide(layers, radius)


def _decide(layers: list[SSN], radius: float) -> None:
    """Decide what became one-hot, in layers of the same device, dtype and number of candidates."""
    control = _stacked(layers, 'weight')
    fixed, choice = _stacked(layers, 'fixed') > 0, _stacked(layers, 'choice')
    ratios = sparsestmax(control, radius)
    fresh = (ratios.amax(-1) == 1) & ~fixed
    # The last of equal candidates, as SparsestMax breaks ties; where the choice of a decided layer
    # got lost, the largest control parameter is the choice.
    found = torch.where(fresh, ratios.argmax(-1), largest(control).squeeze(-1))
    choice = torch.where(fresh | (choice == UNKNOWN), found, choice)
    rows = torch.stack((fixed, fresh, choice), -1).view(2, -1, 3).tolist()
    for layer, *pair in zip(layers, *rows, strict=True):
        choices = []
        for name, (was_fixed, is_fresh, index) in zip(('mean', 'var'), pair, strict=True):
            choices.append(index if was_fixed or is_fresh else None)
            if is_fresh:
                getattr(layer, f'{name}_fixed').fill_(1)
                getattr(layer, f'{name}_choice').fill_(index)
        # Compared, because what is written through .data, as mmaction2 inflates weights, raises no
        # version counter.
        if layer.known_choices() != tuple(choices):
            layer.learn_choices(tuple(choices))


def _stacked(layers: list[SSN], kind: str) -> Tensor:
    """One row for the mean of every layer, then one for the variance of every layer."""
    return torch.stack(
        [getattr(layer, f'{name}_{kind}') for name in ('mean', 'var') for layer in layers]
    )


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
        if parameter.is_meta:
            raise ValueError(
                'model: got SSN layers on the meta device, expected tensors with values; give it '
                'some by model.to_empty(device=...) and load_state_dict or reset_parameters first'
            )


@torch.no_grad()
def copy_selection(source: nn.Module, target: nn.Module) -> None:
    """Copy radius and choices to a model of the same structure, such as an average of the first.

    An average of models averages parameters and some buffers; what an SSN selected cannot be
    averaged. Call this after every update of the average, or once before it is used.

    Args:
        source: The trained model.
        target: The model to follow it; either may be inside wrappers that call it ``module``.

    Raises:
        ValueError: If an SSN of ``source`` has no counterpart with the same candidates.

    Example:
        >>> import copy
        >>> from ssn_plugin import SSN, copy_selection, set_radius
        >>> model = SSN(8)
        >>> average = copy.deepcopy(model)
        >>> set_radius(model, 1.0)
        >>> copy_selection(model, average)
        >>> average.selected
        ('BN', 'BN')
    """
    followers = _by_place(target)
    for place, layer in _by_place(source).items():
        follower = followers.get(place)
        if follower is None or follower.normalizers != layer.normalizers:
            found = 'no SSN' if follower is None else f'candidates {follower.normalizers}'
            raise ValueError(
                f'target: got {found} at {place!r}, expected an SSN with {layer.normalizers}'
            )
        for buffer in ('radius', 'mean_fixed', 'var_fixed', 'mean_choice', 'var_choice'):
            getattr(follower, buffer).copy_(getattr(layer, buffer))
        follower.learn_choices(layer.known_choices())


def _by_place(model: nn.Module) -> dict[str, SSN]:
    """Every SSN by its name without the names of wrappers around the model."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SSN):
            parts = name.split('.')
            while parts and parts[0] in ('module', '_orig_mod'):
                parts.pop(0)
            found['.'.join(parts)] = layer
    return found


def undecided_layers(model: nn.Module) -> list[str]:
    """Names of the SSN layers whose mean or variance is undecided.

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
