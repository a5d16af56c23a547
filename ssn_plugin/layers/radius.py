"""The radius of a whole model, and what becomes of it: decided layers."""

from collections import defaultdict
from itertools import zip_longest

import torch
from torch import Tensor, nn

from ssn_plugin.functional import check_not_negative, sparsestmax
from ssn_plugin.layers.ssn import SSN
from ssn_plugin.ops.sparsestmax import is_one_hot_radius
from ssn_plugin.ops.switchable_norm.ratios import UNKNOWN, Choices, largest

# Ratios become one-hot at the circumradius, or where the largest entry leads by 1. Rounding may
# make them one-hot a little earlier; from this fraction of either limit on they are computed. The
# margin is that of half precision, which rounds most.
_NEARLY = 0.98

# What torch.compile, FSDP and the checkpointing of activations call the module that they wrap.
_WRAPPED = ('_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')


def unwrapped_name(name: str, wrapped: tuple[str, ...] = _WRAPPED) -> str:
    """A name in a model without those that wrappers add.

    DistributedDataParallel adds 'module', which an ordinary part of a model may be called too.
    """
    return '.'.join(part for part in name.split('.') if part not in wrapped)


@torch.no_grad()
def set_radius(model: nn.Module, radius: float) -> None:
    """Set the radius of every SSN of a model and decide the ratios that became one-hot.

    Mean and variance are decided independently: ``mean_fixed`` or ``var_fixed`` turns to 1, and no
    later radius changes the ratios. A layer whose control parameters require no gradient (a frozen
    stage) keeps its radius and its ratios.

    On a GPU this call waits for the device only once in a training: when the radius makes every
    layer one-hot. Before that, the flags are set on the GPU, and the CPU learns of them in the next
    call.

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
    radius = check_not_negative(radius, 'radius')
    # Layers of one number of candidates on one device are projected together.
    alike = defaultdict(_Layers)
    for layer in model.modules():
        if not isinstance(layer, SSN):
            continue
        parameters = layer._parameters
        if 'mean_weight' in parameters and 'var_weight' in parameters:
            mean, var = parameters['mean_weight'], parameters['var_weight']
        else:  # pruned or parametrized
            mean, var = layer._tensor('mean_weight'), layer._tensor('var_weight')
        if not mean.requires_grad:
            continue
        size = len(layer.normalizers)
        plain = type(mean) is nn.Parameter and not mean.is_meta and mean.dim() == 1
        if not plain or mean.numel() != size or var.numel() != size:
            _check_whole(layer)
        group = alike[mean.device, mean.dtype, size]
        group.radii.append(layer._buffers['radius'])
        known = layer.known_choices()
        if mean.is_cpu or known is None or None in known:
            group.layers.append(layer)
            group.known.append(known)
            group.means.append(mean)
            group.variances.append(var)
    for (device, *_), group in alike.items():
        value = torch.full((), radius, device=device)  # without a copy, which would wait for a GPU
        torch._foreach_copy_(group.radii, [value] * len(group.radii))
        if not group.layers:
            continue
        control = torch.stack(group.means + group.variances)
        if device.type == 'cpu':
            _decide(group.layers, group.known, control, radius)
        else:
            _decide_on_device(group.layers, control, radius)


class _Layers:
    """Layers that are decided together; parallel lists, but for the radii of all of them."""

    def __init__(self) -> None:
        self.radii: list[Tensor] = []
        self.layers: list[SSN] = []
        self.known: list[Choices | None] = []
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []


def _decide(layers: list[SSN], known: list[Choices | None], control: Tensor, radius: float) -> None:
    """Decide what became one-hot, in layers on the CPU, of one dtype and number of candidates."""
    # One by one: to stack tensors without a dimension takes longer.
    fixed = [flag.item() > 0 for flag in _tensors(layers, 'fixed')]
    undecided = control[~torch.tensor(fixed)] if any(fixed) else control
    if _is_known(known, fixed) and not _may_become_one_hot(undecided, radius):
        return
    rows = torch.stack(_found(layers, control, radius), -1).tolist()
    for layer, *pair in zip(layers, *_halves(rows), strict=True):
        choices = []
        for name, (is_decided, is_fresh, index) in zip(('mean', 'var'), pair, strict=True):
            choices.append(index if is_decided or is_fresh else None)
            if is_fresh:
                layer._buffers[f'{name}_fixed'].fill_(1)
            if choices[-1] is not None and layer._buffers[f'{name}_choice'].item() != index:
                layer._buffers[f'{name}_choice'].fill_(index)
        if layer.known_choices() != tuple(choices):
            layer.learn_choices(tuple(choices))


def _is_known(known: list[Choices | None], fixed: list[bool]) -> bool:
    """Whether what is known of the layers is what their flags say.

    What is written through ``.data``, as mmaction2 inflates weights, raises no version counter.
    """
    if None in known:
        return False
    return fixed == [choices[half] is not None for half in (0, 1) for choices in known]


def _may_become_one_hot(control: Tensor, radius: float) -> bool:
    """Whether SparsestMax of one of these vectors can be one-hot; almost never before the end."""
    if not len(control) or is_one_hot_radius(radius / _NEARLY, control.shape[-1]):
        return len(control) > 0
    first, second = control.float().topk(2).values.unbind(-1)
    return not bool((first - second < _NEARLY).all())  # NaN neither leads nor follows


def _decide_on_device(layers: list[SSN], control: Tensor, radius: float) -> None:
    """The same without waiting for the device.

    Flags and choices are written there. What was decided is copied to the CPU meanwhile and read by
    the next call, in every process the same one, so that all of them go on alike.
    """
    known = [_arrived(layer) for layer in layers]
    decided, fresh, choice = _found(layers, control, radius)
    decided = decided | fresh
    for kind, values in (('fixed', decided.long()), ('choice', choice.where(decided, UNKNOWN))):
        buffers = _tensors(layers, kind)
        torch._foreach_copy_(buffers, list(values.unbind()))
    if is_one_hot_radius(radius, len(layers[0].normalizers)):
        # All is decided and stays so: one wait, and the passes from here on know it.
        known = list(zip(*_halves(choice.tolist()), strict=True))
    pending = _Pending(choice.where(decided, UNKNOWN))
    for index, (layer, choices) in enumerate(zip(layers, known, strict=True)):
        layer.learn_choices(choices)
        layer._pending = pending, (index, index + len(layers)), layer._known


def _arrived(layer: SSN) -> Choices:
    """Choices that the call before wrote to a layer, if nobody has written to it since."""
    if layer._pending is None:
        return None, None
    pending, rows, known = layer._pending
    if known is None or layer._known is not known or layer.known_choices() is None:
        return None, None
    return tuple(None if k == UNKNOWN else k for k in map(pending.read().__getitem__, rows))


class _Pending:
    """Numbers on their way from a device to the CPU."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values, None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = pinned.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[int]:
        """The numbers; by now they have long arrived."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        if isinstance(self._values, Tensor):
            self._values = self._values.tolist()
        return self._values


def _found(layers: list[SSN], control: Tensor, radius: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row of ``control``: is it decided, did it become one-hot now, and what is chosen."""
    fixed, choice = (torch.stack(_tensors(layers, kind)) for kind in ('fixed', 'choice'))
    ratios = sparsestmax(control, radius)
    fresh = (ratios.amax(-1) == 1) & (fixed <= 0)
    # Where the choice of a decided layer got lost, the largest control parameter is the choice.
    lost = torch.where(fresh, ratios.argmax(-1), largest(control).squeeze(-1))
    return fixed > 0, fresh, torch.where(fresh | (choice == UNKNOWN), lost, choice)


def _tensors(layers: list[SSN], kind: str) -> list[Tensor]:
    """Those of every mean, then those of every variance."""
    names = (f'mean_{kind}', f'var_{kind}')
    return [layer._buffers[name] for name in names for layer in layers]


def _halves(rows: list) -> tuple[list, list]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


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
        target: The model to follow it. Either may be wrapped as a whole or in parts, by
            DistributedDataParallel, FSDP, ``torch.compile``, ``AveragedModel`` and their like.

    Raises:
        ValueError: If their SSN layers differ in number, place or candidates.

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
    places, layers = _ssn_layers(source)
    its_places, copies = _ssn_layers(target)
    if places != its_places:
        pairs = zip_longest(places, its_places, fillvalue='none')
        place, its_place = next(pair for pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f'target: got SSN {its_place} where source has {place}, expected a model of the same '
            'structure'
        )
    for layer, its_copy in zip(layers, copies, strict=True):
        for buffer in ('radius', 'mean_fixed', 'var_fixed', 'mean_choice', 'var_choice'):
            getattr(its_copy, buffer).copy_(getattr(layer, buffer))
        its_copy.learn_choices(layer.known_choices())


def _ssn_layers(model: nn.Module) -> tuple[list[str], list[SSN]]:
    """Name and candidates of every SSN, without the names that wrappers add, and the layers."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, SSN)}
    places = [
        f"'{unwrapped_name(name, ('module', *_WRAPPED))}' with {layer.normalizers}"
        for name, layer in found.items()
    ]
    return places, list(found.values())


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
