"""Turns layers of a model into others: BatchNorm into SSN, SSN into SyncSSN and back."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ssn_plugin.functional import check_normalizers
from ssn_plugin.layers.plain_norms import BatchNorm
from ssn_plugin.layers.ssn import SSN, SSN1d, SSN2d, SSN3d
from ssn_plugin.layers.sync_ssn import SyncSSN

BN_RATIO = 0.9
CANDIDATES = ('IN', 'LN', 'BN')
# What makes these classes of torch differ is the number of dimensions that they accept.
_OF_RANK = {
    nn.BatchNorm1d._check_input_dim: SSN1d,
    nn.BatchNorm2d._check_input_dim: SSN2d,
    nn.BatchNorm3d._check_input_dim: SSN3d,
}


def convert_batch_norm(
    model: nn.Module,
    bn_ratio: float = BN_RATIO,
    normalizers: Sequence[str] = CANDIDATES,
    num_groups: int = 32,
) -> nn.Module:
    r"""Replace every BatchNorm of a model by an SSN that starts as (nearly) that BatchNorm.

    ``nn.BatchNorm1d``, ``2d`` and ``3d`` become ``SSN1d``, ``SSN2d`` and ``SSN3d``,
    ``nn.SyncBatchNorm`` becomes ``SyncSSN``. Parameters and running statistics are the same tensors
    as before, so an optimizer that holds them stays valid; dtype, device, ``requires_grad`` and the
    training flags stay, and a layer that is used in several places stays one layer. A point of the
    simplex is its own sparsemax, so the control parameters are the wanted importance ratios:

    .. math::
        z_{BN} = r, \qquad z_k = \frac{1 - r}{K - 1} \text{ for the others,}

    for mean and variance alike, at radius zero. With r = 1 outputs in evaluation are those of the
    BatchNorm network, bit for bit. With r = 0.9 they are close to those, and training can still
    move the ratios to another candidate.

    An SSN1d is made without the candidate IN if at least two others remain, because its input may
    be (N, C), where IN would take its variance over one number. A BatchNorm whose weight requires
    no gradient is frozen: its ratios would never move, so it becomes an SSN decided for BN.

    Hooks on the forward and the backward pass stay. Left as they are, with a warning that names
    them, are a subclass with a forward pass of its own, a layer whose weight is computed
    (parametrized, pruned), and what lies in a plain list alone. But one that goes on with ``drop``
    and ``act``, as timm's BatchNormAct2d does, becomes a sequence of SSN and these two. Norms that
    hold constants in place of parameters, as torchvision's FrozenBatchNorm2d does, stay.

    Args:
        model: Any module; changed in place.
        bn_ratio: Importance ratio r of BN, in [0, 1].
        normalizers: Candidates of the new layers, BN among them.
        num_groups: Groups of 'GN', if that is a candidate: the largest divisor of C up to it.

    Returns:
        The model; a new layer if the model itself is a BatchNorm.

    Raises:
        ValueError: If an argument is out of its range, a layer has no BatchNorm's shape yet (a lazy
            one), or there is no BatchNorm to convert. Nothing was changed then.

    Example:
        >>> import torch
        >>> from ssn_plugin import convert_batch_norm
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> convert_batch_norm(model)[1].mean_ratios
        tensor([0.0500, 0.0500, 0.9000])
    """
    check_warm_start(bn_ratio, normalizers)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    foreign = [name for name, layer in layers.items() if not _is_plain(layer)]
    if foreign:
        kinds = ', '.join(sorted({type(layers[name]).__name__ for name in foreign}))
        warnings.warn(
            f'convert_batch_norm: left {len(foreign)} layers as they are, which have a forward '
            f'pass of their own or a computed weight ({kinds}): {", ".join(foreign)}',
            stacklevel=2,
        )
    hidden = _hidden(model)
    if hidden:
        warnings.warn(
            f'convert_batch_norm: left the BatchNorms in {", ".join(hidden)}, which are no modules '
            'of the model: keep them in a ModuleList or a ModuleDict',
            stacklevel=2,
        )
    made = {
        layer: _as_ssn(name, layer, bn_ratio, normalizers, num_groups)
        for name, layer in layers.items()
        if name not in foreign
    }
    if not made:
        held = sorted({type(m).__name__ for m in model.modules() if hasattr(m, 'running_mean')})
        others = f' (it has {", ".join(held)})' if held else ''
        raise ValueError(f'model: got no BatchNorm to convert{others}, expected at least one')
    return replace_layers(model, made)


def check_warm_start(bn_ratio: float, normalizers: Sequence[str]) -> None:
    """Raise ValueError if no SSN can start from a BatchNorm with these arguments."""
    if not isinstance(bn_ratio, Real) or not 0 <= bn_ratio <= 1:
        raise ValueError(f'bn_ratio: got {bn_ratio!r}, expected a number in [0, 1]')
    if 'BN' not in check_normalizers(normalizers):
        raise ValueError(f"normalizers: got {tuple(normalizers)!r}, expected 'BN' among them")


def control_of_bn(
    normalizers: Sequence[str], bn_ratio: float, decided: bool = False
) -> dict[str, Tensor]:
    """What an SSN that starts from a BatchNorm holds beside that layer's tensors.

    The other candidates share what ``bn_ratio`` leaves. A ``decided`` layer has decided for BN,
    whatever the ratio.
    """
    bn_ratio = 1 if decided else bn_ratio
    others = (1 - bn_ratio) / (len(normalizers) - 1)
    ratios = torch.tensor([float(bn_ratio if name == 'BN' else others) for name in normalizers])
    return control_of(ratios, ratios, decided)


def control_of(mean: Tensor, var: Tensor, decided: bool = False) -> dict[str, Tensor]:
    """The entries of an SSN's state dict for these importance ratios, at radius zero."""
    return {
        'mean_weight': mean.clone(),
        'var_weight': var.clone(),
        'mean_fixed': torch.tensor(int(decided)),
        'var_fixed': torch.tensor(int(decided)),
        'radius': torch.tensor(0.0),
    }


def _is_plain(layer: _BatchNorm) -> bool:
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward)
    ordinary = type(layer).forward in known or {'drop', 'act'} <= layer._modules.keys()
    return ordinary and 'weight' in layer._parameters  # else a parametrization or pruning has it


def _as_ssn(
    name: str, layer: _BatchNorm, bn_ratio: float, normalizers: Sequence[str], num_groups: int
) -> nn.Module:
    if isinstance(layer, LazyModuleMixin):
        raise ValueError(f'model: got the lazy {name}, expected one run to have given it its shape')
    synced = isinstance(layer, nn.SyncBatchNorm)
    kind = SyncSSN if synced else _OF_RANK.get(type(layer)._check_input_dim, SSN)
    if kind is SSN1d and len(normalizers) > 2:
        # It may get (N, C), where IN has one number for its variance.
        normalizers = [name for name in normalizers if name != 'IN']
    made = kind(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.weight is not None,
        layer.running_mean is not None,
        normalizers,
        num_groups,
    )
    if synced:
        made.process_group = layer.process_group
    frozen = layer.weight is not None and not layer.weight.requires_grad
    for tensor in (layer.weight, layer.running_mean):
        if tensor is not None:
            made.to(tensor.device, tensor.dtype)
    ratios = control_of_bn(normalizers, bn_ratio)['mean_weight']
    for control in (made.mean_weight, made.var_weight):
        control.data.copy_(ratios)
        control.requires_grad_(not frozen)
    if frozen:
        made.select('BN', 'BN')
    for key, value in (*layer._parameters.items(), *layer._buffers.items()):
        if value is not None:
            setattr(made, key, value)
    made.train(layer.training)
    if 'act' in layer._modules:
        made = nn.Sequential(made, layer.drop, layer.act)
        made.training = layer.training
    for name, value in vars(layer).items():
        if name.startswith(('_forward_', '_backward_', '_is_full_backward_')):  # hooks
            setattr(made, name, value)
    return made


def _hidden(model: nn.Module) -> list[str]:
    """Attributes in which parts of a model hold BatchNorms that it does not know as its modules."""
    known = set(model.modules())
    return [
        f'{name}.{attribute}'.removeprefix('.')
        for name, part in model.named_modules()
        for attribute, value in vars(part).items()
        if any(
            isinstance(m, _BatchNorm) and m not in known
            for held in _modules_in(value)
            for m in held.modules()
        )
    ]


def _modules_in(value: object, around: tuple = ()) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    for _, held in _places_in(value, around):
        yield from _modules_in(held, (*around, id(value)))


def _places_in(value: object, around: tuple) -> list[tuple[object, object]]:
    """Key or index and what stands there, of a plain container that is not within itself."""
    if not isinstance(value, dict | list | tuple) or id(value) in around:
        return []
    return list(value.items() if isinstance(value, dict) else enumerate(value))


def replace_layers(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new layers in the places of old ones, wherever a module holds them.

    That may be in an attribute or in plain lists, tuples and dicts too, by which its forward pass
    goes. ``made`` leads from each old layer to the new one; the model is changed in place.

    Returns:
        The model; a new layer if the model itself is replaced.
    """
    for parent in list(model.modules()):
        _replace_in(vars(parent), made)
    return made.get(model, model)


def _replace_in(value: object, made: Mapping[nn.Module, nn.Module], around: tuple = ()) -> object:
    """What takes the place of a value: another for an old layer and for a tuple that holds one.

    Nothing is written where nothing changes, for there are containers that refuse it.
    """
    if isinstance(value, nn.Module):
        return made.get(value, value)
    places = _places_in(value, around)
    new = [_replace_in(held, made, (*around, id(value))) for _, held in places]
    changed = [
        (at, other) for (at, held), other in zip(places, new, strict=True) if other is not held
    ]
    if changed and isinstance(value, tuple):
        return value._make(new) if hasattr(value, '_make') else type(value)(new)
    for at, other in changed:
        value[at] = other
    return value


def convert_sync_ssn(
    model: nn.Module, process_group: 'dist.ProcessGroup | None' = None
) -> nn.Module:
    """Turn every SSN of a model into a SyncSSN.

    The layers stay the same objects, with their parameters, buffers, hooks and selections: what an
    optimizer or another module holds of them stays valid. SSN1d, SSN2d and SSN3d, whose checks of
    the number of dimensions are lost, become SyncSSN too; SN does not.

    Args:
        model: Any module; an SSN itself too.
        process_group: The processes; None is all of them.

    Returns:
        The model.

    Raises:
        ValueError: If ``process_group`` is no process group.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN, convert_sync_ssn, revert_sync_ssn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8))
        >>> type(convert_sync_ssn(model)[1]).__name__
        'SyncSSN'
        >>> type(revert_sync_ssn(model)[1]).__name__
        'SSN'
    """
    for layer in model.modules():
        if type(layer) in (SSN, SSN1d, SSN2d, SSN3d):
            layer.__class__ = SyncSSN
            layer.process_group = process_group
    return model


def revert_sync_ssn(model: nn.Module) -> nn.Module:
    """Turn every SyncSSN of a model into an SSN, in place as :func:`convert_sync_ssn` does.

    Args:
        model: Any module.

    Returns:
        The model.

    Example:
        >>> from ssn_plugin import SyncSSN, revert_sync_ssn
        >>> type(revert_sync_ssn(SyncSSN(8))).__name__
        'SSN'
    """
    for layer in model.modules():
        if type(layer) is SyncSSN:
            del layer._handle
            layer.__class__ = SSN
    return model
