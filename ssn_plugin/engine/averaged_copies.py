"""Finds the averaged and teacher copies of a model in training, by what they are made of.

A copy may be held by a hook (EMAHook, whatever holds torch's ``AveragedModel``) or be a part of the
model that no gradient reaches (the teacher of SoftTeacher, the key encoder of MoCo). Nothing tells
such a part from a frozen stage but that it was made equal to what is trained, so that is looked at
when the training begins; a resumed one is told by its checkpoint.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from ssn_plugin.engine.model_wrapper import unwrapped
from ssn_plugin.layers.ssn import SSN


class Copy(NamedTuple):
    """A copy of the model in training, or of a part of it.

    Attributes:
        name: Where it was found.
        module: The copy, without what wraps it.
        layers: Each of the trained SSN layers, with its copy.
    """

    name: str
    module: nn.Module
    layers: list[tuple[SSN, SSN]]

    def has_new_statistics(self) -> bool:
        """Whether its running statistics are those of a new layer, and those of the model are not.

        If so, the averaging leaves buffers out, and BN in the copy normalises by the initial
        statistics in evaluation, which makes the outputs of the copy wrong.
        """
        return any(
            layer.running_mean is not None
            and bool(layer.running_mean.any())
            and not bool(its_copy.running_mean.any())
            for layer, its_copy in self.layers
        )


class AveragedCopies:
    """The copies that exist in a run, looked for anew only when a hook has a new module.

    Args:
        known: Names of those that an earlier part of the run found.
    """

    def __init__(self, known: tuple[str, ...] = ()) -> None:
        self._known = known
        self._looked_at: dict[str, tuple[nn.Module, Copy | None]] = {}
        self._parts: dict[str, nn.Module] | None = None

    def of(self, runner) -> list[Copy]:
        """All copies."""
        model = unwrapped(runner.model)
        candidates = dict(_held_by_hooks(runner.hooks))
        if self._parts is None:
            self._parts = dict(_parts_without_gradient(model))
        candidates |= self._parts
        for name, module in candidates.items():
            if name not in self._looked_at or self._looked_at[name][0] is not module:
                self._looked_at[name] = module, self._copy(name, module, model)
        found = [self._looked_at[name][1] for name in candidates]
        return [copy for copy in found if copy is not None]

    def _copy(self, name: str, module: nn.Module, model: nn.Module) -> Copy | None:
        """What a candidate is a copy of, None if of nothing."""
        averages = _averages(module)
        inner = module
        while len(children := list(inner.children())) == 1:
            inner = children[0]
        theirs = _ssn_layers(inner)
        own = {id(layer) for layer in theirs.values()}
        ours = {n: layer for n, layer in _ssn_layers(model).items() if id(layer) not in own}
        place, pairs = _pairs_by_name(theirs, ours)
        if pairs and (averages or name in self._known or _equal(inner, model.get_submodule(place))):
            return Copy(name, inner, pairs)
        # An average over several parts numbers its layers itself, so names do not match.
        trained = [layer for layer in ours.values() if layer.mean_weight.requires_grad]
        if averages and _alike(trained, list(theirs.values())):
            return Copy(name, inner, list(zip(trained, theirs.values(), strict=True)))
        return None


def averaged_models(runner) -> list[nn.Module]:
    """The averages of the whole model that hooks hold, with whatever norm layers."""
    kind, found = type(unwrapped(runner.model)), []
    for _, module in _held_by_hooks(runner.hooks):
        if not _averages(module):
            continue
        while type(module) is not kind and len(children := list(module.children())) == 1:
            module = children[0]
        if type(module) is kind:
            found.append(module)
    return found


def _averages(module: nn.Module) -> bool:
    return callable(getattr(module, 'update_parameters', None))  # torch's and mmengine's


def _ssn_layers(module: nn.Module) -> dict[str, SSN]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, SSN)}


def _held_by_hooks(hooks) -> Iterator[tuple[str, nn.Module]]:
    for hook in hooks:
        for attribute, value in getattr(hook, '__dict__', {}).items():
            values = value.values() if isinstance(value, dict) else value
            values = values if isinstance(value, dict | list | tuple) else [value]
            for number, module in enumerate(values):
                if isinstance(module, nn.Module):
                    yield f'{type(hook).__name__}.{attribute}[{number}]', module


def _parts_without_gradient(model: nn.Module, name: str = '') -> Iterator[tuple[str, nn.Module]]:
    """The largest parts that no gradient reaches, and those that average."""
    for child_name, child in model.named_children():
        place = f'{name}.{child_name}' if name else child_name
        if not _ssn_layers(child):
            continue
        trained = any(parameter.requires_grad for parameter in child.parameters())
        several = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if _averages(child) or not (trained or several):
            yield place, child
        else:
            yield from _parts_without_gradient(child, place)


def _pairs_by_name(
    copies: dict[str, SSN], layers: dict[str, SSN]
) -> tuple[str, list[tuple[SSN, SSN]]]:
    """The part of the model that has layers of the same names, and the pairs."""
    first = next(iter(copies), None)
    for name in layers if first is not None else ():
        if first and not f'.{name}'.endswith(f'.{first}'):
            continue
        prefix = name[: len(name) - len(first)]
        sources = [layers.get(prefix + other) for other in copies]
        trained = any(source is not None and source.mean_weight.requires_grad for source in sources)
        if None not in sources and trained and _alike(sources, list(copies.values())):
            return prefix.rstrip('.'), list(zip(sources, copies.values(), strict=True))
    return '', []


def _alike(ours: list[SSN], theirs: list[SSN]) -> bool:
    kinds = [[(m.num_features, m.normalizers) for m in layers] for layers in (ours, theirs)]
    return kinds[0] == kinds[1]


def _equal(copy: nn.Module, source: nn.Module) -> bool:
    ours = dict(source.named_parameters())
    theirs = dict(copy.named_parameters())
    # New norm layers all hold the same values, so equal ones alone do not show that it is a copy.
    return any(parameter.dim() > 1 for parameter in theirs.values()) and all(
        name in ours and torch.equal(parameter.to(ours[name]), ours[name])
        for name, parameter in theirs.items()
    )
