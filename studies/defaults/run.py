"""Train and evaluate rule by rule: one row of results.csv per finished run.

Runs that have a row are skipped, and an interrupted run goes on from its last checkpoint. The plan
grows with the rows: what is confirmed is what the screening found. Classification needs mmpretrain,
fine-tuning mmdet and mmseg, in another environment: a call ends at a run that needs the other one.
"""

import argparse
import importlib.util
import itertools
import sys
from pathlib import Path

import torch

from ssn_plugin.checkpoint.publish import publish_backbone
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.preflight import check_data
from studies.defaults.recipe import CANDIDATES, SCREENING, config_of, plan, pretraining_of
from studies.ledger import (
    Budget,
    Row,
    add_run_arguments,
    choose_device,
    matches,
    name_of,
    provenance,
    read,
    work_through,
)
from studies.small_batches import run as small_batches
from studies.transfer import run as transfer

PACKAGES = {'cls': 'mmpretrain', 'det': 'mmdet', 'seg': 'mmseg'}


def run_one(run: Row, data: Path, work_dir: Path, budget: Budget, device: str) -> Row | None:
    """Train and evaluate one run.

    Args:
        run: An entry of the plan.
        data: That of its task.
        work_dir: For logs and checkpoints, beside those of the other runs.
        budget: Ends the run behind a checkpoint.
        device: 'cpu' or 'cuda'.

    Returns:
        The other fields of its row, or None if the budget ended before the run did.
    """
    if run['task'] == 'cls':
        config = config_of(run, data, '', work_dir)
        finished = small_batches.train(config, CANDIDATES, budget, device)
        outcome = finished and finished[0]
    else:
        backbone = backbone_of(run, work_dir.parent)
        config = config_of(run, data, backbone, work_dir)
        outcome = transfer.fine_tune(config, run['task'], CANDIDATES, budget, device)
    if outcome is None:
        return None
    part = 'screening' if run['seed'] in SCREENING else 'confirmation'
    scores = dict.fromkeys(('top1', 'box_ap50', 'mask_ap50', 'miou', 'pixel_accuracy'), '')
    facts = ('wall_seconds', 'pieces', *provenance(device))
    weights = outcome.get('backbone', '')  # the name is taken: by what kind of backbone it is
    filled = {**scores, **outcome, 'weights': weights, 'backbone': run['backbone']}
    ordered = sorted(filled, key=lambda name: name in facts)  # stable: facts last
    return {'part': part, **{name: filled[name] for name in ordered}}


def backbone_of(run: Row, work_dir: Path) -> str:
    """The published backbone that a fine-tuning starts from.

    Args:
        run: An entry of the plan, not of classification.
        work_dir: That of all runs.

    Raises:
        CheckpointError: If its pre-training has not been run there.
    """
    source = _pretrained_file(run, work_dir)
    out = work_dir / 'backbones'
    out.mkdir(parents=True, exist_ok=True)
    return str(publish_backbone(source, out / f'{source.parent.name}.pth').path)


def _pretrained_file(run: Row, work_dir: Path) -> Path:
    epochs = small_batches.SIZES[run['size']]['epochs']
    return work_dir / name_of(pretraining_of(run)) / f'epoch_{epochs}.pth'


def main() -> None:
    """Parse, check, work through the plan as far as this environment can."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python -m studies.defaults.run --images data/imagefolder '
        '--scenes data/demo',
    )
    parser.add_argument(
        '--images',
        type=Path,
        required=True,
        metavar='FOLDER',
        help='holds train/CLASS/* and val/CLASS/*',
    )
    parser.add_argument(
        '--scenes',
        type=Path,
        required=True,
        metavar='FOLDER',
        help='what tools/make_demo_dataset.py makes',
    )
    parser.add_argument(
        '--ahead',
        action='store_true',
        help='go on with the runs behind those that need the other environment or its weights',
    )
    add_run_arguments(parser, 'defaults')
    args = parser.parse_args()
    choose_device(args.device)
    torch.set_num_threads(1)  # the same sums every time
    budget = Budget(args.budget_minutes)
    results = args.out / 'results.csv'
    data = {'cls': args.images, 'det': args.scenes, 'seg': args.scenes}

    def execute(run: Row, folder: Path) -> Row | None:
        return run_one(run, data[run['task']], folder, budget, args.device)

    try:
        while not budget.spent:
            rows = read(results)
            left = [r for r in plan(args.size, rows) if not any(matches(row, r) for row in rows)]
            here = list(itertools.takewhile(lambda run: _is_here(run['task']), left))
            if args.ahead:
                here = [run for run in left if _is_ready(run, args.work_dir)]
            if not here:
                print(f'next: {name_of(left[0])}' if left else 'nothing left to do')
                return
            for split in ('train', 'val'):
                task = here[0]['task']
                check_data(config_of(here[0], data[task], '', args.work_dir), split)
            work_through(here, args.work_dir, results, budget, execute)
            if len(read(results)) == len(rows):  # another process has them
                return
    except (InputError, CheckpointError) as error:
        sys.exit(f'run.py: {error}')


def _is_here(task: str) -> bool:
    return importlib.util.find_spec(PACKAGES[task]) is not None


def _is_ready(run: Row, work_dir: Path) -> bool:
    """Whether the environment can run it and the backbone that it starts from is there."""
    trains_backbone = run['task'] == 'cls'
    return _is_here(run['task']) and (trains_backbone or _pretrained_file(run, work_dir).is_file())


if __name__ == '__main__':
    main()
