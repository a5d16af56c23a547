"""What a run starts with, in a few lines, and what in it will not work, with its remedy."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile

from mmengine.dist import get_world_size
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ssn_plugin.analysis.config_entries import as_list, norm_configs, type_name
from ssn_plugin.engine.unheard import unheard_settings
from ssn_plugin.errors import InputError
from ssn_plugin.layers.radius import undecided_layers
from ssn_plugin.layers.ssn import SSN
from ssn_plugin.layers.switch_norm import SN
from ssn_plugin.layers.switchable import SwitchableNorm
from ssn_plugin.layers.sync_ssn import SyncSSN
from ssn_plugin.models.collapsed_model import NAME as COLLAPSED

_OTHER_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
# With this many images per process, or fewer, IN and BN are nearly the same in training.
_FEW_IMAGES = 4
_SSN_TYPES = ('SSN', 'SSN1d', 'SSN2d', 'SSN3d', 'SyncSSN')


def norms_in_words(model: nn.Module) -> list[str]:
    """Which norm layers a model has, and where: of this package, then all others."""
    lines = []
    switchable = _by_kind(model, SwitchableNorm)
    for kind, layers in switchable.items():
        candidates = Counter(', '.join(layer.normalizers) for layer in layers.values())
        told = '; '.join(
            names if len(candidates) == 1 else f'{names} in {count}'
            for names, count in candidates.items()
        )
        lines.append(f'{len(layers)} {kind} in {_places(layers)}; candidates {told}')
    ssn = sum(isinstance(layer, SSN) for layer in model.modules())
    if ssn:
        lines.append(f'{ssn - len(undecided_layers(model))} of {ssn} SSN layers are decided')
    stay = ', which stay what they are' if switchable else ''
    for kind, layers in _by_kind(model, _OTHER_NORMS).items():
        lines.append(f'{len(layers)} {kind} in {_places(layers)}{stay}')
    return lines


def check_norms_asked_for(model: nn.Module, config: Mapping) -> None:
    """See that a config that asks for SSN has brought it into the model.

    Raises:
        InputError: Naming every ``norm_cfg`` of the model.
    """
    asked = _request_for_ssn(config)
    found = any(isinstance(layer, SwitchableNorm) for layer in model.modules())
    if asked is None or found or type_name(config['model']) == COLLAPSED:
        return
    entries = list(norm_configs(config['model'], 'model'))
    if entries:
        told = ', '.join(f'{key}.norm_cfg is {type_name(norm)}' for key, norm in entries)
        remedy = f'set each of them, as in --cfg-options {entries[0][0]}.norm_cfg.type=SSN'
    else:
        told = 'no part of model has a norm_cfg'
        remedy = 'set one in each part that takes it, as in model.backbone.norm_cfg.type=SSN'
    raise InputError(
        f'model: has no SSN layer, although {asked}: {told}; {remedy}; '
        'to train without SSN, take that line out of the config'
    )


def _request_for_ssn(config: Mapping) -> str | None:
    """What in a config says that SSN is wanted."""
    for key, norm in norm_configs(config, ''):
        if type_name(norm) in _SSN_TYPES:
            return f'{key}.norm_cfg is {type_name(norm)}'.removeprefix('.')
    hooks = map(type_name, as_list(config.get('custom_hooks')))
    return 'custom_hooks has SSNRadiusHook' if 'SSNRadiusHook' in hooks else None


def check_classes(model: nn.Module, classes: Sequence[str] | None) -> None:
    """See that every head that tells classes apart has as many as the data set.

    Raises:
        InputError: Naming the head that has fewer.
    """
    for name, head in _heads(model):
        if classes and _limit(head) < len(classes):
            raise InputError(
                f'{name}.num_classes: got {head.num_classes}, expected at least {len(classes)}, '
                'the number of classes of the training data set'
            )


def check_labels(model: nn.Module, batch: object) -> None:
    """See that no label of a batch is beyond the classes of the heads.

    The loss that meets one says nothing of where it comes from; on a GPU it says nothing at all.

    A batch that is not of mmdet, mmseg or mmpretrain is left alone.

    Raises:
        InputError: Naming the label, its image and the head.
    """
    samples = batch.get('data_samples') if isinstance(batch, Mapping) else None
    for name, head in _heads(model):
        for sample in samples if isinstance(samples, list | tuple) else ():
            labels = _labels_of(sample)
            if labels is None or not labels.numel():
                continue
            labels = labels[labels != getattr(head, 'ignore_index', 255)]
            largest = int(labels.max()) if labels.numel() else -1
            if largest >= _limit(head):
                raise InputError(
                    f'{name}.num_classes: got {head.num_classes}, expected more, because '
                    f'{getattr(sample, "img_path", "an image of the first batch")} has the label '
                    f'{largest}; set num_classes, or map labels to 0 ... num_classes - 1, and '
                    'those to be ignored to 255 in a segmentation'
                )


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The heads that tell classes apart; one that proposes regions knows a single class."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if 'Head' not in kind or kind == 'FusedSemanticHead' or name.endswith('rpn_head'):
            continue
        if isinstance(getattr(module, 'num_classes', None), int):
            yield name, module


def _limit(head: nn.Module) -> int:
    """How many classes a head tells apart; mmseg calls it 1 where one channel tells two apart."""
    return 2 if getattr(head, 'out_channels', None) == 1 else head.num_classes


def _labels_of(sample: object) -> Tensor | None:
    if 'gt_sem_seg' in sample:
        return sample.gt_sem_seg.data
    if 'gt_instances' in sample:
        return sample.gt_instances.get('labels')
    return sample.get('gt_label')


def training_warnings(
    model: nn.Module,
    images: int | None,
    hooks: Sequence[str],
    config: Mapping,
    optimizers: Sequence,
) -> Iterator[str]:
    """What will keep layers from being decided, or decide them for nothing, with its remedy.

    Args:
        model: What is trained, with the weights that it starts from; put into training mode.
        images: Images of each process; None where that is not known.
        hooks: Class names of the hooks of the run.
        config: The whole config; it may be empty.
        optimizers: Those of the run.
    """
    layers = dict(model.named_modules())
    undecided = {name: layers[name] for name in undecided_layers(model)}
    learning = {n: layer for n, layer in undecided.items() if layer.mean_weight.requires_grad}
    frozen = {n: layer for n, layer in undecided.items() if n not in learning}
    if learning and 'SSNRadiusHook' not in hooks:
        yield (
            f'no hook grows the radius, so {len(learning)} SSN layers will stay mixtures: add '
            "dict(type='SSNRadiusHook') to custom_hooks"
        )
    yield from _optimizer_warnings(
        [*learning.values(), *(m for m in layers.values() if isinstance(m, SN))], config, optimizers
    )
    if frozen:
        yield (
            f'{len(frozen)} undecided SSN layers do not learn and will stay mixtures, in '
            f'{_places(frozen)}: their norm_cfg has requires_grad=False, or frozen_stages covers '
            'them; set requires_grad=True and frozen_stages=-1, or start from decided weights'
        )
    for name, setting, count in unheard_settings(model):  # the model is in training mode from here
        yield (
            f'{setting}=True of {name or "the model"} reaches BatchNorm alone, so {count} SSN '
            f"layers train on: set {setting}=False, or take type='SSNResNet', which obeys norm_eval"
        )
    held = {name: layer for name, layer in learning.items() if not layer.training}
    if held:
        yield (
            f'{len(held)} undecided SSN layers take running statistics while they learn, in '
            f'{_places(held)}: set norm_eval=False, or start from decided weights'
        )
    if images is not None and images <= _FEW_IMAGES:
        yield from _few_images_warnings(layers, learning, images)


def _optimizer_warnings(
    layers: Sequence[nn.Module], config: Mapping, optimizers: Sequence
) -> Iterator[str]:
    control = {id(parameter) for m in layers for parameter in (m.mean_weight, m.var_weight)}
    own = [
        group
        for optimizer in optimizers
        for group in optimizer.param_groups
        if any(id(parameter) in control for parameter in group['params'])
    ]
    wrapper = config.get('optim_wrapper')
    missing = isinstance(wrapper, Mapping) and not wrapper.get('constructor')
    decay = max((group.get('weight_decay') or 0 for group in own), default=0)
    if own and (decay or missing):
        told = f'the weight decay {decay:g}' if decay else 'the learning rate'
        yield (
            f'control parameters get {told} of all others: set '
            "optim_wrapper=dict(constructor='SSNOptimWrapperConstructor')"
        )


def _few_images_warnings(
    layers: Mapping[str, nn.Module], learning: Mapping[str, nn.Module], images: int
) -> Iterator[str]:
    several = get_world_size() > 1
    alone = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, SSN)
        and layer.training
        and 'BN' in layer.normalizers
        and not (several and isinstance(layer, SyncSSN))
    }
    misled = {n: layer for n, layer in alone.items() if n in learning and 'IN' in layer.normalizers}
    if misled:
        yield (
            f'images per process: {images}, and {len(misled)} SSN layers have yet to select '
            'between IN and BN, which so few images hardly tell apart in training, but in '
            "evaluation: set normalizers=('LN', 'GN', 'BN') in their norm_cfg and end=0.3 in "
            'SSNRadiusHook, or SyncSSN over several processes (docs/convert.md)'
        )
    settled = {n: m for n, m in alone.items() if n not in learning and 'BN' in m.selected}
    if settled and images == 1:
        yield (
            f'1 image per process, and {len(settled)} SSN layers have selected BN, whose '
            'statistics it is in training and not in evaluation: set norm_eval=True for those of '
            f'an SSNResNet, in {_places(settled)}'
        )


def _by_kind(model: nn.Module, kinds: type | tuple) -> dict[str, dict[str, nn.Module]]:
    found: dict[str, dict[str, nn.Module]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, kinds):
            found.setdefault(type(layer).__name__, {})[name] = layer
    return found


def _places(names: Mapping[str, nn.Module]) -> str:
    """The parts of a model that layers are in, each with the number of its own.

    Of few layers of a part the place is told exactly.
    """
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.partition('.')[0], []).append(name)
    return ', '.join(f'{_common(own)} ({len(own)})' for own in parts.values())


def _common(names: Sequence[str]) -> str:
    """The innermost module that all layers are in."""
    levels = zip(*(name.split('.') for name in names), strict=False)
    return '.'.join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
