"""Replaces every SSN by the one normalizer it chose."""

from collections.abc import Mapping

import torch
from torch import nn

from ssn_plugin.layers.convert import replace_layers
from ssn_plugin.layers.plain_norms import (
    BatchNorm,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
)
from ssn_plugin.layers.selected_norm import SelectedNorm
from ssn_plugin.layers.ssn import SSN, SSN1d, SSN2d, SSN3d

# For each SSN class, the batch norm and the instance norm that take the same inputs. An SSN without
# a number in its name takes inputs of any number of dimensions, so its BatchNorm finds out from the
# first input which of torch's it is.
_TORCH_LAYERS = (
    (SSN1d, nn.BatchNorm1d, InstanceNorm1d),
    (SSN2d, nn.BatchNorm2d, InstanceNorm2d),
    (SSN3d, nn.BatchNorm3d, InstanceNorm3d),
    (SSN, BatchNorm, InstanceNorm2d),
)


def collapse_ssn(model: nn.Module, native: bool = False, keep_undecided: bool = False) -> nn.Module:
    """Replace every decided SSN of a model by the normalizer that it chose.

    ================== ============================================================================
    mean and variance  become
    ================== ============================================================================
    both BN            ``nn.BatchNorm2d``
    both IN            ``nn.InstanceNorm2d``; with ``correction=1`` a ``SelectedNorm``
    both LN            ``nn.GroupNorm(1, C)``; with ``correction=1`` a ``SelectedNorm``
    both GN            ``nn.GroupNorm(num_groups, C)``; with ``correction=1`` a ``SelectedNorm``
    different ones     :class:`ssn_plugin.SelectedNorm`, which computes these two statistics
    ================== ============================================================================

    ``SSN1d`` and ``SSN3d`` become the 1d and 3d layers. An ``SSN`` without a number in its name
    takes any number of dimensions; its BatchNorm learns from the first input which of torch's it
    is. Instance and group norms are subclasses of torch's: they take maps of 1 x 1, and are exact
    in ONNX. For ``torch.fx`` all of them are leaves, as torch's own are.

    The output in evaluation stays the same up to rounding. In training the new layers are what
    their names say: they differ from the SSN only for 'BN' with ``correction=1``, whose batch
    variance torch computes without the correction.

    Parameters and buffers are copies, of the same dtype and device; ``requires_grad`` and the
    training flags stay. A layer that is used in several places stays one layer. Gradients and hooks
    of the replaced layers are lost, and an optimizer made before goes on with their parameters.

    Args:
        model: Any module; changed in place.
        native: Take torch's layers for ``correction=1`` too. Their variance lacks the factor
            H*W / (H*W - 1), so outputs change, the more the smaller the maps are.
        keep_undecided: Leave layers that are still a mixture as they are.

    Returns:
        The model; a new layer if the model itself is an SSN.

    Raises:
        ValueError: If layers are undecided and ``keep_undecided`` is false. It names them, and
            nothing was changed.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN2d, collapse_ssn, set_radius
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN2d(8)).eval()
        >>> set_radius(model, 1.0)
        >>> type(collapse_ssn(model)[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    return replace_ssn(model, choices_of(model, keep_undecided), native)


def choices_of(model: nn.Module, keep_undecided: bool = False) -> dict[str, tuple[str, str]]:
    """Name of every decided SSN -> the normalizers of its mean and of its variance.

    Raises:
        ValueError: If there are such layers and ``keep_undecided`` is false.
    """
    chosen = {n: m.selected for n, m in model.named_modules() if isinstance(m, SSN)}
    undecided = [name or 'the model itself' for name, pair in chosen.items() if None in pair]
    if undecided and not keep_undecided:
        raise ValueError(
            f'model: got {len(undecided)} undecided of {len(chosen)} SSN layers, expected every '
            f'ratio to be one-hot: {", ".join(undecided)}'
        )
    return {name: pair for name, pair in chosen.items() if None not in pair}


def replace_ssn(
    model: nn.Module, choices: Mapping[str, tuple[str, str]], native: bool = False
) -> nn.Module:
    """Replace SSN layers, in place, by what they are told to have chosen; all others stay.

    Returns:
        The model; a new layer if the model itself is replaced.

    Raises:
        ValueError: If there is no SSN of a name in ``choices``.
    """
    made = {}
    layers = dict(model.named_modules())
    for name, (mean, var) in choices.items():
        layer = layers.get(name)
        if not isinstance(layer, SSN):
            found = 'nothing' if layer is None else f'a {type(layer).__name__}'
            raise ValueError(f'choices: got {found} named {name!r} in the model, expected an SSN')
        made[layer] = _collapsed(layer, mean, var, native)
    return replace_layers(model, made)


def _collapsed(layer: SSN, mean: str, var: str, native: bool) -> nn.Module:
    batch_norm, instance_norm = next(
        kinds for kind, *kinds in _TORCH_LAYERS if isinstance(layer, kind)
    )
    size, eps, affine = layer.num_features, layer.eps, layer.affine
    groups = {'IN': size, 'LN': 1, 'GN': layer.num_groups}.get(mean)
    # Running statistics hold the corrected variance; all others are computed anew.
    corrected = layer.correction and not (mean == 'BN' and layer.track_running_stats)
    with torch.device(layer.radius.device):
        of_torch = mean == var and (mean == 'BN' or groups is not None)
        if not of_torch or (corrected and not native):
            made = SelectedNorm(
                size,
                mean,
                var,
                eps,
                layer.momentum,
                affine,
                layer.track_running_stats,
                layer.num_groups,
                layer.correction,
            )
        elif mean == 'BN':
            made = batch_norm(size, eps, layer.momentum, affine, layer.track_running_stats)
        elif groups == size:
            made = instance_norm(size, eps, affine=affine)
        else:
            made = GroupNorm(groups, size, eps, affine)
    for name in ('weight', 'bias'):
        old = getattr(layer, name)
        if old is not None:
            made._parameters[name] = nn.Parameter(old.detach().clone(), old.requires_grad)
    for name in ('running_mean', 'running_var', 'num_batches_tracked'):
        if made._buffers.get(name) is not None:
            made._buffers[name] = layer._buffers[name].clone()
    return made.train(layer.training)
