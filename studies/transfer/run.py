"""Fine-tune and evaluate every norm at every batch size: one row of results.csv per finished run.

Runs that have a row are skipped, and an interrupted run goes on from its last checkpoint. Several
processes may run this at the same time. Needs mmdet and mmseg.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from ssn_plugin.analysis.layer_ratios import layer_ratios
from ssn_plugin.checkpoint.publish import publish_backbone
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.preflight import check_data
from studies.ledger import (
    Budget,
    Row,
    add_run_arguments,
    add_trained_argument,
    choose_device,
    name_of,
    provenance,
    work_through,
)
from studies.pieces import BudgetSpentError, PieceHook
from studies.rules import CANDIDATES, shares
from studies.small_batches import run as small_batches
from studies.transfer.recipe import TASKS, config_of, plan

# The run of small_batches that a backbone is of, but for norm and seed.
PRETRAINED_BATCH = 32


def backbone_of(run: Row, trained: Path, out: Path, batch: int = PRETRAINED_BATCH) -> str:
    """The published backbone that a run starts from.

    Args:
        run: An entry of the plan.
        trained: Work dir of the study on small batches.
        out: Folder for published backbones.
        batch: Images per batch that the backbone was trained with.

    Raises:
        CheckpointError: If that study has not finished the run whose backbone it is.
    """
    checkpoint = checkpoint_of(run, trained, batch)
    out.mkdir(parents=True, exist_ok=True)
    return str(publish_backbone(checkpoint, out / f'{checkpoint.parent.name}.pth').path)


def checkpoint_of(run: Row, trained: Path, batch: int = PRETRAINED_BATCH) -> Path:
    """The checkpoint of small_batches whose backbone a run starts from.

    Args:
        run: An entry of the plan.
        trained: Work dir of the study on small batches.
        batch: Images per batch that it was trained with.
    """
    source = dict(size=run['size'], norm=run['norm'], batch=batch, seed=run['seed'])
    epochs = small_batches.SIZES[run['size']]['epochs']
    return trained / name_of(source) / f'epoch_{epochs}.pth'


def run_one(
    run: Row, data: Mapping[str, Path], trained: Path, work_dir: Path, budget: Budget, device: str
) -> Row | None:
    """Train and evaluate one run.

    Args:
        run: An entry of the plan.
        data: Name of each data set -> its folder.
        trained: Work dir of the study on small batches.
        work_dir: For logs and checkpoints.
        budget: Ends the run behind a checkpoint.
        device: 'cpu' or 'cuda'.

    Returns:
        The other fields of its row, or None if the budget ended before the run did.
    """
    backbone = backbone_of(run, trained, work_dir.parent / 'backbones')
    config = config_of(run, data, backbone, work_dir)
    return fine_tune(config, run['task'], CANDIDATES, budget, device)


def fine_tune(
    config: Config, task: str, candidates: Sequence[str], budget: Budget, device: str
) -> Row | None:
    """Train and evaluate one config.

    Args:
        config: As ``config_of`` makes it.
        task: 'det' or 'seg'.
        candidates: Normalizers whose shares are recorded.
        budget: Ends the run behind a checkpoint.
        device: 'cpu' or 'cuda'.

    Returns:
        What a row says of it, or None if the budget ended before the run did.
    """
    runner = Runner.from_cfg(config)
    piece = PieceHook(budget)
    runner.register_hook(piece)
    try:
        runner.train()
    except BudgetSpentError:
        return None
    metrics = runner.val_loop.run()
    losses = runner.message_hub.get_scalar('train/loss')
    ratios = layer_ratios(runner.model)
    return {
        'iterations': runner.iter,
        **scores(task, metrics),
        'train_loss': f'{losses.mean(max(runner.iter // 8, 1)):.4f}',
        **shares(ratios, candidates),
        'undecided': sum(not row.decided for row in ratios) if ratios else '',
        'backbone': Path(config.model.backbone.init_cfg.checkpoint).name,
        'wall_seconds': round(piece.seconds),
        'pieces': piece.pieces,
        **provenance(device),
    }


def scores(task: str, metrics: Mapping[str, float]) -> dict[str, str]:
    """The results of a run, in percent: those of its task, the others empty.

    Args:
        task: 'det' or 'seg'.
        metrics: Of CocoMetric or IoUMetric.
    """
    values = {
        'box_ap50': metrics.get('coco/bbox_mAP_50'),
        'mask_ap50': metrics.get('coco/segm_mAP_50'),
        'miou': metrics.get('mIoU'),
        'pixel_accuracy': metrics.get('aAcc'),
    }
    factor = {'det': 100, 'seg': 1}[task]
    return {
        name: '' if value is None else f'{factor * float(value):.2f}'
        for name, value in values.items()
    }


def folder_of(text: str) -> tuple[str, Path]:
    """Parse NAME=FOLDER.

    Args:
        text: As given to --data.

    Raises:
        argparse.ArgumentTypeError: If it is not that.
    """
    name, equals, folder = text.partition('=')
    if name not in TASKS or not equals or not folder:
        raise argparse.ArgumentTypeError(
            f'got {text}, expected NAME=FOLDER with a NAME of {", ".join(TASKS)}'
        )
    return name, Path(folder)


def main() -> None:
    """Parse, check, work through the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python -m studies.transfer.run --data demo=data/demo coco=data/coco',
    )
    parser.add_argument(
        '--data',
        type=folder_of,
        nargs='+',
        required=True,
        metavar='NAME=FOLDER',
        help='demo: what tools/make_demo_dataset.py makes; coco, cityscapes: folders in the layout '
        'of these; runs of data sets that are not named wait for another call',
    )
    add_trained_argument(parser)
    add_run_arguments(parser, 'transfer')
    args = parser.parse_args()
    choose_device(args.device)
    data = dict(args.data)
    runs = plan(args.size, list(data))
    torch.set_num_threads(1)  # the same sums every time
    budget = Budget(args.budget_minutes)
    try:
        check(runs, data, args.work_dir)
        work_through(
            runs,
            args.work_dir,
            args.out / 'results.csv',
            budget,
            lambda run, folder: run_one(run, data, args.trained, folder, budget, args.device),
        )
    except (InputError, CheckpointError) as error:
        sys.exit(f'run.py: {error}')


def check(runs: list[Row], data: Mapping[str, Path], work_dir: Path) -> None:
    """Look for the data of every data set and task before the first run.

    Args:
        runs: The plan.
        data: Name of each data set -> its folder.
        work_dir: For logs and checkpoints.

    Raises:
        InputError: Naming what is missing.
    """
    first = {(run['data'], run['task']): run for run in reversed(runs)}
    for run in first.values():
        config = config_of(run, data, '', work_dir)
        for split in ('train', 'val'):
            check_data(config, split)


if __name__ == '__main__':
    main()
