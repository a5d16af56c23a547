"""What differs between the runs: their plan, and the config of each."""

from pathlib import Path

from mmengine.config import Config

from studies.ledger import Row
from studies.transfer import recipe as transfer

BATCHES = (2, 1)
TASKS = ('det', 'seg')
SEEDS = (0, 1)
CANDIDATES_OF_HEADS = ('IN', 'LN', 'GN')
REMEDIES = ('norm_eval', 'no-BN', 'norm_eval+no-BN', 'PreciseStatsHook', 'chosen-at-2')


def plan(size: str) -> list[Row]:
    """The runs, in their order: a seed is complete before the next one begins.

    Args:
        size: 'cpu' or 'gpu'.
    """
    return [
        dict(size=size, task=task, remedy=remedy, batch=batch, seed=seed)
        for seed in SEEDS
        for task in TASKS
        for batch in BATCHES
        for remedy in REMEDIES
    ]


def of_transfer(run: Row) -> Row:
    """The run of the study on transfer that a run changes in one thing.

    Args:
        run: An entry of the plan.
    """
    shared = {name: run[name] for name in ('batch', 'seed')}
    return dict(size=run['size'], data='demo', task=run['task'], norm='SSN', **shared)


def config_of(run: Row, data: Path, backbone: str, work_dir: Path) -> Config:
    """The config of one run.

    Args:
        run: An entry of the plan.
        data: What tools/make_demo_dataset.py makes.
        backbone: File of published weights; that of 'chosen-at-2' is another one.
        work_dir: For logs and checkpoints.
    """
    config = transfer.config_of(of_transfer(run), {'demo': data}, backbone, work_dir)
    remedy = run['remedy']
    if 'norm_eval' in remedy:
        config.model.backbone.norm_eval = True
    if 'no-BN' in remedy:
        groups = transfer.SIZES[run['size']]['groups']
        for part in transfer.new_parts(config.model):
            part.norm_cfg = dict(type='SSN', normalizers=CANDIDATES_OF_HEADS, num_groups=groups)
    if remedy == 'PreciseStatsHook':
        config.custom_hooks.append(dict(type='PreciseStatsHook'))
    return config
