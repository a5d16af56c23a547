"""The few lines of a config that tell one run from another."""

import re
from collections.abc import Iterator, Mapping

from mmengine.config import Config

from ssn_plugin.analysis.report_page import Section
from ssn_plugin.engine.hooks.radius_hook import SSNRadiusHook
from ssn_plugin.jobs.preflight import datasets_of, pretrained_in
from ssn_plugin.ops.sparsestmax import circumradius


def summarise(config: Config, max_iters: int | None = None) -> list[Section]:
    """Model, normalisation, data, optimisation and schedule of a config.

    Args:
        config: The whole config of a run.
        max_iters: Iterations of the run, where they are known.

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


def shown(value: object) -> str:
    """A value of a config in words.

    Args:
        value: Of any type.

    Example:
        >>> from ssn_plugin.jobs.config_summary import shown
        >>> shown(dict(type='SGD', lr=0.02, weight_decay=1e-4))
        'SGD, lr 0.02, weight_decay 0.0001'
        >>> shown([dict(type='LinearLR', end=100), 7])
        'LinearLR, end 100; 7'
    """
    if isinstance(value, Mapping):
        words = [str(value['type'])] if 'type' in value else []
        words += [f'{key} {shown(entry)}' for key, entry in value.items() if key != 'type']
        return ', '.join(words)
    if isinstance(value, list | tuple):
        separator = '; ' if any(isinstance(entry, Mapping) for entry in value) else ', '
        return separator.join(map(shown, value))
    return str(value)


def _model(config: Config) -> Iterator[tuple[str, str]]:
    model = config.get('model') or {}
    if 'type' in model:
        yield 'type', str(model['type'])
    for key, part in model.items():
        if isinstance(part, Mapping) and 'type' in part and key != 'data_preprocessor':
            words = [str(part['type'])]
            for name in ('depth', 'num_classes', 'frozen_stages', 'norm_eval'):
                if name in part:
                    words.append(f'{name} {part[name]}')
            yield key, ', '.join(words)
            for name, head in part.items():
                if name.endswith('head') and isinstance(head, Mapping) and 'type' in head:
                    yield f'{key}.{name}', str(head['type'])
    for _, key, checkpoint in pretrained_in(model, 'model'):
        part = re.sub(r'\.(init_cfg(\.\d+)?|pretrained)$', '', key)
        yield f'weights of {part}', checkpoint
    if config.get('load_from'):
        yield 'load_from', str(config.load_from)


def _norms(config: Config) -> Iterator[tuple[str, str]]:
    """Each norm_cfg once, with the parts of the model that have it."""
    places: dict[str, list[str]] = {}
    for key, norm in _norm_configs(config.get('model') or {}, ''):
        places.setdefault(shown(norm), []).append(key or 'model')
    for norm, keys in places.items():
        yield ', '.join(keys), norm


def _norm_configs(node: object, key: str) -> Iterator[tuple[str, Mapping]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            if name == 'norm_cfg' and isinstance(child, Mapping):
                yield key, child
            else:
                yield from _norm_configs(child, f'{key}.{name}'.lstrip('.'))
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from _norm_configs(child, f'{key}.{index}')


def _data(config: Config) -> Iterator[tuple[str, str]]:
    for split in ('train', 'val'):
        loader = config.get(f'{split}_dataloader')
        if not loader:
            continue
        yield f'{split}: images per process', str(loader.get('batch_size'))
        for _, dataset in datasets_of(config, split):
            root = dataset.get('data_root') or ''
            annotations = dataset.get('ann_file') or ''
            yield f'{split}: data', f'{dataset.get("type")}, {root}{annotations}'.rstrip(', ')


def _optimisation(config: Config) -> Iterator[tuple[str, str]]:
    wrapper = config.get('optim_wrapper') or {}
    for key, value in wrapper.items():
        if key == 'type' and value == 'OptimWrapper':
            continue
        if value is not None:
            yield key, shown(value)
    if config.get('randomness'):
        yield 'randomness', shown(config.randomness)


def _schedule(config: Config, max_iters: int | None) -> Iterator[tuple[str, str]]:
    if config.get('train_cfg'):
        yield 'loop', shown(config.train_cfg)
    for number, scheduler in enumerate(_listed(config.get('param_scheduler')), 1):
        yield f'scheduler {number}', shown(scheduler)
    for hook in _listed(config.get('custom_hooks')):
        if str(hook.get('type')).rsplit('.', 1)[-1] != 'SSNRadiusHook':
            continue
        options = {k: v for k, v in hook.items() if k not in ('type', 'priority')}
        schedule = SSNRadiusHook(**options)
        yield (
            'radius',
            f'{schedule.start_radius:g} to {schedule.end_radius:g}, '
            f'from {100 * schedule.begin:g} % to {100 * schedule.end:g} % of the run',
        )
        if max_iters:
            one_hot = circumradius(3)  # of three candidates
            at = (i for i in range(max_iters) if schedule.radius_at(i, max_iters) >= one_hot)
            first = next(at, None)
            yield (
                'all layers of three candidates decided',
                'never' if first is None else f'from iteration {first + 1} of {max_iters}',
            )


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value] if value else []
