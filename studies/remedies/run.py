"""Fine-tune and evaluate SSN with every remedy: one row of results.csv per finished run.

Runs that have a row are skipped, and an interrupted run goes on from its last checkpoint. Several
processes may run this at the same time. Needs mmdet and mmseg.
"""

import argparse
import sys
from pathlib import Path

import torch

from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.preflight import check_checkpoint
from studies.ledger import (
    Budget,
    Row,
    add_run_arguments,
    add_trained_argument,
    choose_device,
    work_through,
)
from studies.remedies.recipe import config_of, of_transfer, plan
from studies.rules import CANDIDATES
from studies.transfer.run import PRETRAINED_BATCH, backbone_of, check, checkpoint_of, fine_tune


def pretrained_batch(run: Row) -> int:
    """Images per batch that the backbone of a run was trained with.

    Args:
        run: An entry of the plan.
    """
    return 2 if run['remedy'] == 'chosen-at-2' else PRETRAINED_BATCH


def run_one(
    run: Row, data: Path, trained: Path, work_dir: Path, budget: Budget, device: str
) -> Row | None:
    """Train and evaluate one run.

    Args:
        run: An entry of the plan.
        data: What tools/make_demo_dataset.py makes.
        trained: Work dir of the study on small batches.
        work_dir: For logs and checkpoints.
        budget: Ends the run behind a checkpoint.
        device: 'cpu' or 'cuda'.

    Returns:
        The other fields of its row, or None if the budget ended before the run did.
    """
    backbones = work_dir.parent / 'backbones'
    backbone = backbone_of(of_transfer(run), trained, backbones, pretrained_batch(run))
    config = config_of(run, data, backbone, work_dir)
    return fine_tune(config, run['task'], (*CANDIDATES, 'GN'), budget, device)


def main() -> None:
    """Parse, check, work through the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python -m studies.remedies.run --data data/demo',
    )
    parser.add_argument(
        '--data',
        type=Path,
        required=True,
        metavar='FOLDER',
        help='what tools/make_demo_dataset.py makes',
    )
    add_trained_argument(parser)
    add_run_arguments(parser, 'remedies')
    args = parser.parse_args()
    choose_device(args.device)
    runs = plan(args.size)
    torch.set_num_threads(1)  # the same sums every time
    budget = Budget(args.budget_minutes)
    try:
        needed = {
            checkpoint_of(of_transfer(run), args.trained, pretrained_batch(run)) for run in runs
        }
        for path in sorted(needed):
            check_checkpoint('--trained', str(path))
        check([of_transfer(run) for run in runs], {'demo': args.data}, args.work_dir)
        work_through(
            runs,
            args.work_dir,
            args.out / 'results.csv',
            budget,
            lambda run, folder: run_one(run, args.data, args.trained, folder, budget, args.device),
        )
    except (InputError, CheckpointError) as error:
        sys.exit(f'run.py: {error}')


if __name__ == '__main__':
    main()
