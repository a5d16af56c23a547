"""What differs between the runs: the plan, which grows with the rows, and the config of each."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ssn_plugin import undecided_layers
from studies.defaults import batch_renorm  # noqa: F401 - registers the layer
from studies.ledger import Row, matches
from studies.small_batches import run as small_batches
from studies.transfer import recipe as transfer

NORMS = ('BN', 'GN', 'SN')
CANDIDATES = ('IN', 'LN', 'GN', 'BN')
# CANDIDATES@END: those of every layer, and the part of the run after which the radius is 1.
PAPER = 'IN-LN-BN@1.0'
RULES = ('LN-GN-BN@0.3', 'IN-LN-GN-BN@0.3', 'LN-GN-BN@1.0')
LATER_RULES = ('IN-LN-BN@0.3', 'LN-GN-BN@0.5', 'LN-GN-BN@0.15', PAPER)
# CANDIDATES@END+LEVER: one more thing is changed.
FULL_RATE, LATE_BEGIN, MORE_BN, RENORM = 'lr', 'begin', 'BN', 'renorm'
LEVER_RULES = tuple(f'{RULES[0]}+{lever}' for lever in (FULL_RATE, LATE_BEGIN, MORE_BN, RENORM))
# Its 'BN' is left out where it has fewer than 16 values per channel. Only these cells have such
# layers: the image pooling of DeepLabV3+, the last maps (2 x 2) of the classifier.
FEW_VALUES, MIN_VALUES = 'few', 16
SHIPPED = f'{RULES[0]}+{FEW_VALUES}'
FEW_VALUES_CELLS = (('seg', 4), ('seg', 2), ('seg', 1), ('cls', 2))
# What a fine-tuned backbone does: of the run's own rule and on its stored statistics, the same with
# live statistics, or that of the paper's rule, as released weights are, on its stored statistics.
STORED, LIVE, RELEASED = 'stored', 'live', 'released'
PRETRAINED_BATCH = 32
BATCHES = {'cls': (32, 8, 2), 'seg': (4, 2, 1), 'det': (4, 2, 1)}
SCORES = {'cls': 'top1', 'seg': 'miou', 'det': 'box_ap50'}
SCREENING, CONFIRMATION = (10,), (0, 1, 2)
FRESH = (3, 4, 5)  # for what was found in the runs of the others
# Seeds of the published rows of BN, GN and SN.
PUBLISHED = {'cls': (0, 1, 2), 'seg': (0, 1), 'det': (0, 1)}
SCREENING_CELLS = (('cls', 32), ('seg', 1), ('det', 1))
LATER_CELL = ('cls', 2)
LR_FACTORS = (1.0, 0.5, 2.0)
# Where the first rule's training is disturbed at the largest rate: whether its early end is why.
DISTURBED_CELLS = (('seg', 4), ('seg', 2), ('det', 4))


def run_of(
    size: str,
    rule: str,
    cell: tuple[str, int],
    seed: int,
    backbone: str = STORED,
    lr_factor: float = 1.0,
) -> Row:
    """The fields that name a run.

    Args:
        size: 'cpu' or 'gpu'.
        rule: A norm, CANDIDATES@END or CANDIDATES@END+LEVER.
        cell: Task and images per batch.
        seed: Of the run, and of the backbone that it starts from.
        backbone: STORED, LIVE or RELEASED; classification has none.
        lr_factor: By which the learning rate of the recipe is multiplied.
    """
    task, batch = cell
    kind = 'none' if task == 'cls' else backbone
    return dict(
        size=size,
        task=task,
        rule=rule,
        backbone=kind,
        batch=batch,
        seed=seed,
        lr_factor=lr_factor,
    )


def plan(size: str, rows: Sequence[Row]) -> list[Row]:
    """The runs in their order, as far as the rows tell which they are.

    Until the screening has been run, the first rule stands for its winner, at the end.

    Args:
        size: 'cpu' or 'gpu'.
        rows: Of results.csv.
    """
    seed = SCREENING[0]
    runs = [run_of(size, rule, cell, seed) for cell in SCREENING_CELLS for rule in RULES]
    screened = all_done(runs, rows)
    best = winner(size, rows) if screened else RULES[0]
    if not screened:
        runs = list(_most_decisive_first(size, runs))
    runs += _confirmation(size, best)
    quick = [(t, b) for t in ('seg', 'det', 'cls') for b in BATCHES[t] if (t, b) != LATER_CELL]
    runs += [run_of(size, norm, ('cls', PRETRAINED_BATCH), seed) for norm in NORMS]
    if screened and best == RULES[0]:
        runs += _few_values(size, rows)
    slow = RULES[2]
    runs += [run_of(size, slow, c, seed, lr_factor=f) for c in DISTURBED_CELLS for f in (1.0, 2.0)]
    runs += _learning_rates(size, best, quick, rows)
    levers = [run_of(size, rule, cell, seed) for cell in SCREENING_CELLS for rule in LEVER_RULES]
    runs += [*levers, *_other_backbones(size, best, RELEASED)]
    if screened and all_done(levers, rows):
        runs += _second(size, best, rows)
    shipped = SHIPPED if best == RULES[0] else best
    runs += _learning_rates(size, shipped, [LATER_CELL], rows)
    runs += _other_backbones(size, best, LIVE)
    runs += [run_of(size, rule, cell, seed) for cell in SCREENING_CELLS for rule in LATER_RULES]
    runs += [run_of(size, rule, LATER_CELL, seed) for rule in (*LEVER_RULES, *RULES, *LATER_RULES)]
    return list(_unique(runs))


def _most_decisive_first(size: str, screening: Sequence[Row]) -> Iterator[Row]:
    """The screening; what of the first rule can be compared with published rows before its end."""
    last = SCREENING_CELLS[-1][0]
    ahead = [('seg', batch) for batch in reversed(BATCHES['seg'])]
    yield from (run for run in screening if run['task'] != last or run['rule'] == RULES[0])
    for cells in (ahead, [('det', 1)]):
        for seed in (0, 1):
            yield run_of(size, RULES[0], ('cls', PRETRAINED_BATCH), seed)
            yield from (run_of(size, RULES[0], cell, seed) for cell in cells)
    yield from screening


def _confirmation(size: str, rule: str) -> Iterator[Row]:
    """What decides first comes first: cells whose other norms have been run, quick ones."""
    tuned = [(task, batch) for task in ('seg', 'det') for batch in reversed(BATCHES[task])]
    for seed in (0, 1):
        for cell in (('cls', 32), *tuned):
            yield run_of(size, rule, cell, seed)
    for cell in (('cls', 2), ('cls', 8)):
        for seed in (0, 1):
            yield run_of(size, rule, cell, seed)
    for cell in (('cls', 32), *tuned, ('cls', 2), ('cls', 8)):
        yield run_of(size, rule, cell, 2)
    for cell in (('cls', 32), *tuned):
        for norm in NORMS:
            if possible(norm, cell):
                yield run_of(size, norm, cell, 2)


def _other_backbones(size: str, rule: str, kind: str) -> Iterator[Row]:
    for seed in CONFIRMATION:
        if kind == RELEASED:
            yield run_of(size, PAPER, ('cls', PRETRAINED_BATCH), seed)
        for task in ('seg', 'det'):
            for batch in reversed(BATCHES[task]):
                yield run_of(size, rule, (task, batch), seed, kind)


def _second(size: str, rule: str, rows: Sequence[Row]) -> Iterator[Row]:
    """The lever, if one scored above the rule itself, in detection, with its backbones."""
    lever = max(LEVER_RULES, key=lambda name: screening_mean(size, name, rows))
    if screening_mean(size, lever, rows) > screening_mean(size, rule, rows):
        for seed in CONFIRMATION:
            for cell in (('cls', PRETRAINED_BATCH), *(('det', b) for b in BATCHES['det'])):
                yield run_of(size, lever, cell, seed)


def _few_values(size: str, rows: Sequence[Row]) -> Iterator[Row]:
    """The shipped rule where it differs from the winner, first on seeds nobody has looked at."""
    for seed in FRESH:
        yield run_of(size, RULES[0], ('cls', PRETRAINED_BATCH), seed)
    for cell in FEW_VALUES_CELLS:
        yield from (run_of(size, SHIPPED, cell, seed) for seed in FRESH)
        if cell == LATER_CELL:
            continue
        yield from rates(size, SHIPPED, cell)
        factor = best_rate(size, SHIPPED, cell, rows)
        for seed in (*FRESH, *CONFIRMATION):
            yield run_of(size, SHIPPED, cell, seed)
            if factor not in (None, LR_FACTORS[0]):
                yield run_of(size, SHIPPED, cell, seed, lr_factor=factor)


def _learning_rates(
    size: str, rule: str, cells: Sequence[tuple[str, int]], rows: Sequence[Row]
) -> Iterator[Row]:
    """Each at every factor with the seed of the screening, then its best with the others."""
    for cell in cells:
        for name in (rule, *NORMS):
            if possible(name, cell):
                yield from rates(size, name, cell)
                factor = best_rate(size, name, cell, rows)
                if factor not in (None, LR_FACTORS[0]):
                    for seed in CONFIRMATION:
                        run = run_of(size, name, cell, seed, lr_factor=factor)
                        if cell[0] != 'cls':
                            yield pretraining_of(run)
                        yield run


def rates(size: str, name: str, cell: tuple[str, int]) -> list[Row]:
    """The runs at every learning rate, with the seed of the screening.

    Args:
        size: 'cpu' or 'gpu'.
        name: A norm or a rule.
        cell: Task and images per batch.
    """
    return [run_of(size, name, cell, SCREENING[0], lr_factor=factor) for factor in LR_FACTORS]


def best_rate(size: str, name: str, cell: tuple[str, int], rows: Sequence[Row]) -> float | None:
    """The factor of the learning rate with the highest score, or None if one has not been run.

    Args:
        size: 'cpu' or 'gpu'.
        name: A norm or a rule.
        cell: Task and images per batch.
        rows: Of results.csv.
    """
    tried = rates(size, name, cell)
    if not all_done(tried, rows):
        return None
    return max(tried, key=lambda run: score(run, rows))['lr_factor']


def possible(name: str, cell: tuple[str, int]) -> bool:
    """Whether torch trains the norm there.

    Args:
        name: A norm or a rule.
        cell: Task and images per batch.
    """
    return (cell[0], name, cell[1]) != transfer.IMPOSSIBLE


def _unique(runs: Sequence[Row]) -> Iterator[Row]:
    seen = set()
    for run in runs:
        key = tuple(run.values())
        if key not in seen:
            seen.add(key)
            yield run


def all_done(runs: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Whether every run has a row.

    Args:
        runs: Fields that name each.
        rows: Of results.csv.
    """
    return all(any(matches(row, run) for row in rows) for run in runs)


def score(run: Row, rows: Sequence[Row]) -> float:
    """Top-1, box AP50 or mIoU of a run that has a row.

    Args:
        run: The fields that name it.
        rows: Of results.csv.
    """
    (row,) = (row for row in rows if matches(row, run))
    return float(row[SCORES[run['task']]])


def winner(size: str, rows: Sequence[Row]) -> str:
    """The rule with the highest mean score over the cells of the screening.

    Args:
        size: 'cpu' or 'gpu'.
        rows: Of results.csv; the screening has been run.
    """
    return max(RULES, key=lambda rule: screening_mean(size, rule, rows))


def screening_mean(size: str, rule: str, rows: Sequence[Row]) -> float:
    """Mean score over the cells of the screening.

    Args:
        size: 'cpu' or 'gpu'.
        rule: CANDIDATES@END or CANDIDATES@END+LEVER, which has been run in each of them.
        rows: Of results.csv.
    """
    runs = [run_of(size, rule, cell, SCREENING[0]) for cell in SCREENING_CELLS]
    return sum(score(run, rows) for run in runs) / len(runs)


def pretraining_of(run: Row) -> Row:
    """The run of this study whose backbone a fine-tuning starts from.

    Args:
        run: An entry of the plan, not of classification.
    """
    # No layer of the backbone has few values at 32 images.
    own = RULES[0] if run['rule'] == SHIPPED else run['rule']
    rule = PAPER if run['backbone'] == RELEASED else own
    return run_of(run['size'], rule, ('cls', PRETRAINED_BATCH), run['seed'])


def config_of(run: Row, data: Path, backbone: str, work_dir: Path) -> Config:
    """The config of one run.

    Args:
        run: An entry of the plan.
        data: Class folders for classification, else what tools/make_demo_dataset.py makes.
        backbone: File of published weights; not read for classification.
        work_dir: For logs and checkpoints.
    """
    rule, task = run['rule'], run['task']
    norm = rule if rule in NORMS else 'SSN'
    shared = dict(size=run['size'], norm=norm, batch=run['batch'], seed=run['seed'])
    if task == 'cls':
        config = small_batches.config_of(shared, data, work_dir)
    else:
        other = dict(**shared, data='demo', task=task)
        config = transfer.config_of(other, {'demo': data}, backbone, work_dir)
    config.optim_wrapper.optimizer.lr *= run['lr_factor']
    if norm == 'SSN':
        _set_rule(config, run)
    return config


def _set_rule(config: Config, run: Row) -> None:
    rule, _, lever = run['rule'].partition('+')
    candidates, _, end = rule.partition('@')
    normalizers = tuple(candidates.split('-'))
    groups = transfer.SIZES[run['size']]['groups']
    norm_cfg = dict(type='SSN', normalizers=normalizers, num_groups=groups)
    for hook in config.custom_hooks:
        if hook['type'] == 'SSNRadiusHook':
            hook['end'] = float(end)
            hook['begin'] = 0.1 if lever == LATE_BEGIN else 0.0
            hook['min_values'] = MIN_VALUES if lever == FEW_VALUES else 0
    if lever == FULL_RATE:
        config.optim_wrapper.paramwise_cfg.ssn_lr_mult = 1.0
    elif lever == MORE_BN:
        ratios = [0.5 if name == 'BN' else 0.25 for name in normalizers]
        config.custom_hooks.append(dict(type='InitialRatiosHook', ratios=ratios))
    elif lever == RENORM:
        norm_cfg.update(type='BatchRenormSSN', warm_up=_iterations(config) // 10)
    for part in transfer.new_parts(config.model):
        if 'norm_cfg' in part:  # not in the neck of a classifier
            part.norm_cfg = norm_cfg
    backbone = config.model.backbone
    if run['backbone'] != RELEASED:
        backbone.norm_cfg = norm_cfg
    backbone.norm_eval = run['backbone'] in (STORED, RELEASED)


def _iterations(config: Config) -> int:
    if 'max_iters' in config.train_cfg:
        return config.train_cfg.max_iters
    folder = Path(config.train_dataloader.dataset.data_root) / 'train'
    per_epoch = sum(1 for _ in folder.glob('*/*')) // config.train_dataloader.batch_size
    return config.train_cfg.max_epochs * per_epoch


@HOOKS.register_module()
class InitialRatiosHook(Hook):
    """Starts undecided layers at given ratios instead of equal ones.

    Args:
        ratios: One for each candidate; they sum to 1.
    """

    def __init__(self, ratios: Sequence[float]) -> None:
        self.ratios = ratios

    def before_train(self, runner: Runner) -> None:
        if runner.iter == 0:  # not resumed
            for name in undecided_layers(runner.model):
                layer = runner.model.get_submodule(name)
                for control in (layer.mean_weight, layer.var_weight):
                    control.data.copy_(torch.tensor(self.ratios))
