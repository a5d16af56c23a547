"""Train and evaluate every norm at every batch size: one row of results.csv per finished run.

Runs that have a row are skipped, and an interrupted run goes on from its last epoch. Several
processes may run this at the same time. Needs mmpretrain.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from ssn_plugin.analysis.comparison import common_name
from ssn_plugin.analysis.layer_ratios import STATISTICS, LayerRatios, layer_ratios
from ssn_plugin.errors import InputError
from ssn_plugin.jobs.class_folders import check_class_folders
from ssn_plugin.jobs.configs import load_config
from ssn_plugin.jobs.preflight import check_data
from studies.ledger import (
    Budget,
    Row,
    add_run_arguments,
    choose_device,
    provenance,
    record,
    work_through,
)
from studies.pieces import BudgetSpentError, PieceHook
from studies.rules import CANDIDATES, set_rules, shares
from studies.small_batches.analyze import BATCHES, NORMS

SEEDS = (0, 1, 2)
# 2 to 16 channels per group, as GN has with its 32 groups in a ResNet-18 of full width.
SIZES = {
    'cpu': dict(channels=16, groups=8, epochs=8),
    'gpu': dict(channels=64, groups=32, epochs=40),
}
# The demo's learning rate, and the batch it is for.
LR, LR_BATCH = 0.05, 32


def plan(size: str) -> list[Row]:
    """The runs, in their order: a seed is complete before the next one begins.

    Args:
        size: 'cpu' or 'gpu'.
    """
    return [
        dict(size=size, norm=norm, batch=batch, seed=seed)
        for seed in SEEDS
        for batch in BATCHES
        for norm in NORMS
    ]


def config_of(run: Row, data: Path, work_dir: Path) -> Config:
    """The config of one run.

    Args:
        run: An entry of the plan.
        data: Folder with train/CLASS/* and val/CLASS/*.
        work_dir: For logs and checkpoints.
    """
    os.environ['SSN_IMAGEFOLDER'] = str(data)  # read by the config
    config = load_config(str(Path(__file__).with_name('config.py')))
    size, norm, batch = SIZES[run['size']], run['norm'], run['batch']
    epochs, channels = size['epochs'], size['channels']
    norm_cfg = dict(type=norm.split('-')[0])
    if norm == 'GN':
        norm_cfg['num_groups'] = size['groups']
    iterations = sum(1 for _ in data.glob('train/*/*')) // batch
    set_rules(config, norm, max(iterations, 1))
    config.merge_from_dict(
        {
            'model.backbone.base_channels': channels,
            'model.backbone.stem_channels': channels,
            'model.head.in_channels': 8 * channels,
            'optim_wrapper.optimizer.lr': LR * batch / LR_BATCH,
            'param_scheduler.1.end': epochs,
            'train_cfg.max_epochs': epochs,
            'train_cfg.val_begin': epochs + 1,  # run_one() evaluates, once, at the end
            'train_dataloader.batch_size': batch,
            'randomness.seed': run['seed'],
        }
    )
    config.model.backbone.norm_cfg = norm_cfg
    config.work_dir = str(work_dir)
    config.experiment_name = work_dir.name
    config.resume = True  # from the last checkpoint of the work dir, if there is one
    return config


def run_one(run: Row, data: Path, work_dir: Path, out: Path, budget: Budget, device: str) -> Row:
    """Train, evaluate and record the choices of one run.

    Args:
        run: An entry of the plan.
        data: Folder with train/CLASS/* and val/CLASS/*.
        work_dir: For logs and checkpoints.
        out: Folder of selections.csv.
        budget: Ends the run behind an epoch.
        device: 'cpu' or 'cuda'.

    Returns:
        The other fields of its row, or None if the budget ended before the run did.
    """
    finished = train(config_of(run, data, work_dir), CANDIDATES, budget, device)
    if finished is None:
        return None
    outcome, ratios = finished
    if ratios:
        record(out / 'selections.csv', run, choices(run, ratios))
    return {'epochs': SIZES[run['size']]['epochs'], **outcome}


def train(
    config: Config, candidates: Sequence[str], budget: Budget, device: str
) -> tuple[Row, list[LayerRatios]] | None:
    """Train and evaluate one config.

    Args:
        config: As ``config_of`` makes it.
        candidates: Normalizers whose shares are recorded.
        budget: Ends the run behind an epoch.
        device: 'cpu' or 'cuda'.

    Returns:
        What a row says of it, and the importance ratios; None if the budget ended before the run
        did.
    """
    runner = Runner.from_cfg(config)
    piece = PieceHook(budget)
    runner.register_hook(piece)
    try:
        runner.train()
    except BudgetSpentError:
        return None
    top1 = runner.val_loop.run()['accuracy/top1']
    losses = runner.message_hub.get_scalar('train/loss')
    ratios = layer_ratios(runner.model)
    outcome = {
        'iterations': runner.iter,
        'top1': f'{top1:.2f}',
        'train_loss': f'{losses.mean(len(runner.train_dataloader)):.4f}',
        **shares(ratios, candidates),
        'undecided': sum(not row.decided for row in ratios) if ratios else '',
        'wall_seconds': round(piece.seconds),
        'pieces': piece.pieces,
        **provenance(device),
    }
    return outcome, ratios


def choices(run: Row, ratios: Sequence[LayerRatios]) -> list[Row]:
    """Rows of selections.csv: the importance ratios of each layer's mean and variance.

    Args:
        run: An entry of the plan.
        ratios: Layer by layer.
    """
    return [
        {
            **run,
            'layer': common_name(row.layer),
            'statistic': statistic,
            **{name: f'{value:.4f}' for name, value in row.ratios(statistic).items()},
        }
        for row in ratios
        for statistic in STATISTICS
    ]


def main() -> None:
    """Parse, check, work through the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python -m studies.small_batches.run --data data/imagefolder',
    )
    parser.add_argument(
        '--data',
        type=Path,
        required=True,
        metavar='FOLDER',
        help='holds train/CLASS/* and val/CLASS/*',
    )
    add_run_arguments(parser, 'small_batches')
    args = parser.parse_args()
    choose_device(args.device)
    runs = plan(args.size)
    try:
        config = config_of(runs[0], args.data, args.work_dir)
        for split in ('train', 'val'):
            check_data(config, split)
        check_class_folders(config, ('train', 'val'))
    except InputError as error:
        sys.exit(f'run.py: {error}')
    torch.set_num_threads(1)  # the same sums every time; run it twice to use two cores
    budget = Budget(args.budget_minutes)
    work_through(
        runs,
        args.work_dir,
        args.out / 'results.csv',
        budget,
        lambda run, folder: run_one(run, args.data, folder, args.out, budget, args.device),
    )


if __name__ == '__main__':
    main()
