"""The few lines of a config that tell one run from another."""

import re
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import NamedTuple

from ssn_plugin.analysis.config_entries import (
    as_list,
    checkpoints_in,
    datasets_of,
    norm_configs,
    type_name,
)
from ssn_plugin.ops.sparsestmax import circumradius
from ssn_plugin.training import radius_at


class Section(NamedTuple):
    """Facts under a heading.

    Attributes:
        heading: What they are about.
        facts: Names and values.
    """

    heading: str
    facts: Sequence[tuple[str, str]]


def summarise(config: Mapping, max_iters: int | None = None) -> list[Section]:
    """Model, normalisation, data, optimisation and schedule of a config.

    Returns:
        Sections without those that have nothing to say.
    """
    sections = [
        Section('Model', list(_model(config))),
        Section('Normalisation', list(_norms(config))),
        Section('Data', list(_data(config))),
        Section('Optimisation', list(_optimisation(config))),
        Section('Schedule', list(_schedule(config, max_iters))),
    ]
    return [section for section in sections if section.facts]


def in_words(value: object) -> str:
    """A value of a config in words.

    Example:
        >>> from ssn_plugin.analysis.config_summary import in_words
        >>> in_words(dict(type='SGD', lr=0.02, weight_decay=1e-4))
        'SGD, lr 0.02, weight_decay 0.0001'
        >>> in_words([dict(type='LinearLR', end=100), 7])
        'LinearLR, end 100; 7'
    """
    if isinstance(value, Mapping):
        words = [type_name(value)] if 'type' in value else []
        words += [f'{key} {in_words(entry)}' for key, entry in value.items() if key != 'type']
        return ', '.join(words)
    if isinstance(value, list | tuple):
        separator = '; ' if any(isinstance(entry, Mapping) for entry in value) else ', '
        return separator.join(map(in_words, value))
    return str(value)


def _model(config: Mapping) -> Iterator[tuple[str, str]]:
    model = config.get('model') or {}
    if 'type' in model:
        yield 'type', type_name(model)
    for key, part in model.items():
        if isinstance(part, Mapping) and 'type' in part and key != 'data_preprocessor':
            words = [type_name(part)]
            for name in ('depth', 'num_classes', 'frozen_stages', 'norm_eval'):
                if name in part:
                    words.append(f'{name} {part[name]}')
            yield key, ', '.join(words)
            for name, head in part.items():
                if name.endswith('head') and isinstance(head, Mapping) and 'type' in head:
                    yield f'{key}.{name}', type_name(head)
    for _, key, checkpoint, _ in checkpoints_in(model, 'model'):
        part = re.sub(r'\.(init_cfg(\.\d+)?|pretrained)$', '', key)
        yield f'weights of {part}', checkpoint
    if config.get('load_from'):
        yield 'load_from', str(config['load_from'])


def _norms(config: Mapping) -> Iterator[tuple[str, str]]:
    """Each norm_cfg once, with the parts of the model that have it."""
    places: dict[str, list[str]] = {}
    for key, norm in norm_configs(config.get('model') or {}, ''):
        places.setdefault(in_words(norm), []).append(key or 'model')
    for norm, keys in places.items():
        yield ', '.join(keys), norm


def _data(config: Mapping) -> Iterator[tuple[str, str]]:
    for split in ('train', 'val'):
        loader = config.get(f'{split}_dataloader')
        if not loader:
            continue
        yield f'{split}: images per process', str(loader.get('batch_size'))
        for _, dataset in datasets_of(config, split):
            root = dataset.get('data_root') or ''
            annotations = dataset.get('ann_file') or ''
            yield f'{split}: data', f'{type_name(dataset)}, {root}{annotations}'.rstrip(', ')


def _optimisation(config: Mapping) -> Iterator[tuple[str, str]]:
    wrapper = config.get('optim_wrapper') or {}
    for key, value in wrapper.items():
        if key == 'type' and value == 'OptimWrapper':
            continue
        if value is not None:
            yield key, in_words(value)
    if config.get('randomness'):
        yield 'randomness', in_words(config['randomness'])


def _schedule(config: Mapping, max_iters: int | None) -> Iterator[tuple[str, str]]:
    if config.get('train_cfg'):
        yield 'loop', in_words(config['train_cfg'])
    for number, scheduler in enumerate(as_list(config.get('param_scheduler')), 1):
        yield f'scheduler {number}', in_words(scheduler)
    for hook in as_list(config.get('custom_hooks')):
        if type_name(hook) != 'SSNRadiusHook':
            continue
        known = signature(radius_at).parameters
        options = {k: v for k, v in hook.items() if k in known}
        schedule = signature(radius_at).bind(progress=0.0, **options)
        schedule.apply_defaults()
        yield (
            'radius',
            '{start_radius:g} to {end_radius:g}, from {begin:.3g} to {end:.3g} of the run'.format(
                **schedule.arguments
            ),
        )
        if max_iters:
            one_hot = circumradius(3)  # of three candidates
            last = max(max_iters - 1, 1)
            first = next(
                (i for i in range(max_iters) if radius_at(i / last, **options) >= one_hot), None
            )
            yield (
                'all layers of three candidates decided',
                'never' if first is None else f'from iteration {first + 1} of {max_iters}',
            )
