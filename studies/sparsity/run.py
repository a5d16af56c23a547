"""Evaluate every SSN checkpoint of the study on small batches as it is and collapsed.

One row of results.csv per checkpoint; those that have a row are skipped. Needs mmpretrain.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn

from ssn_plugin import SSN, collapse_ssn
from ssn_plugin.checkpoint.files import read_checkpoint, weights_in
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.preflight import check_data
from studies.ledger import (
    ROOT,
    Budget,
    Row,
    add_run_arguments,
    add_trained_argument,
    choose_device,
    matches,
    name_of,
    provenance,
    read,
    work_through,
)
from studies.small_batches.run import config_of

# Percentage points of top-1: another device rounds otherwise, which moves an image or two.
TOLERANCE = 0.5


def plan(size: str, trained: list[dict[str, str]]) -> list[Row]:
    """The SSN runs of the other study that are finished.

    Args:
        size: 'cpu' or 'gpu'.
        trained: Rows of its results.csv.
    """
    return [
        dict(size=size, norm='SSN', batch=int(row['batch']), seed=int(row['seed']))
        for row in trained
        if row['size'] == size and row['norm'] == 'SSN'
    ]


def top1_of(run: Row, trained: list[dict[str, str]]) -> float:
    """What a run of the other study had at its end.

    Args:
        run: An entry of the plan.
        trained: Rows of its results.csv.
    """
    return next(float(row['top1']) for row in trained if matches(row, run))


def evaluate_one(run: Row, data: Path, trained: Path, expected: float, device: str) -> Row:
    """Evaluate the last checkpoint of one run, as it is and collapsed.

    Args:
        run: An entry of the plan.
        data: Folder with val/CLASS/*.
        trained: Work dir of the study on small batches.
        expected: Top-1 that the run had at its end.
        device: 'cpu' or 'cuda'.

    Raises:
        CheckpointError: If the checkpoint has another top-1 on these images.
    """
    config = config_of(run, data, trained)
    path = trained / name_of(run) / f'epoch_{config.train_cfg.max_epochs}.pth'
    init_default_scope(config.default_scope)
    # mmengine's Runner does this to the config; without it the images stay as they are.
    config.model.data_preprocessor = config.data_preprocessor
    model = MODELS.build(config.model)
    model.load_state_dict(weights_in(read_checkpoint(path), str(path)))
    model.to(device).eval()
    collapsed = collapse_ssn(copy.deepcopy(model))
    before, labels = logits(model, config)
    after, _ = logits(collapsed, config)
    classes = before.argmax(1), after.argmax(1)
    top1 = [f'{100 * (found == labels).double().mean().item():.2f}' for found in classes]
    if abs(float(top1[0]) - expected) > TOLERANCE:
        raise CheckpointError(
            f'{path}: got a top-1 of {top1[0]} on {data}, expected the {expected:.2f} of its row'
        )
    return {
        'images': len(labels),
        'top1': top1[0],
        'top1_collapsed': top1[1],
        'relative_difference': f'{((before - after).abs().max() / before.abs().max()).item():.2e}',
        'other_classes': int((classes[0] != classes[1]).sum()),
        'ssn_layers': sum(isinstance(module, SSN) for module in model.modules()),
        'ssn_layers_collapsed': sum(isinstance(module, SSN) for module in collapsed.modules()),
        **provenance(device),
    }


@torch.no_grad()
def logits(model: nn.Module, config: Config) -> tuple[Tensor, Tensor]:
    """Logits of all held-out images, (images, classes), and their labels.

    Args:
        model: A classifier.
        config: Has the data loader.
    """
    found, labels = [], []
    for batch in Runner.build_dataloader(config.val_dataloader):
        batch = model.data_preprocessor(batch, training=False)
        found.append(model.head(model.extract_feat(batch['inputs'])).cpu())
        labels += [sample.gt_label for sample in batch['data_samples']]
    return torch.cat(found), torch.cat(labels).cpu()


def main() -> None:
    """Parse, check, work through the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python -m studies.sparsity.run --data data/imagefolder',
    )
    parser.add_argument(
        '--data',
        type=Path,
        required=True,
        metavar='FOLDER',
        help='what small_batches was trained on: train/CLASS/* and val/CLASS/*',
    )
    add_trained_argument(parser)
    parser.add_argument(
        '--trained-results',
        type=Path,
        default=ROOT / 'studies/small_batches',
        help='folder of its results.csv (default: %(default)s)',
    )
    add_run_arguments(parser, 'sparsity')
    args = parser.parse_args()
    choose_device(args.device)
    trained = read(args.trained_results / 'results.csv')
    runs = plan(args.size, trained)
    torch.set_num_threads(1)
    try:
        if runs:
            check_data(config_of(runs[0], args.data, args.trained), 'val')
        work_through(
            runs,
            args.work_dir,
            args.out / 'results.csv',
            Budget(args.budget_minutes),
            lambda run, _: evaluate_one(
                run, args.data, args.trained, top1_of(run, trained), args.device
            ),
        )
    except (InputError, CheckpointError) as error:
        sys.exit(f'run.py: {error}')


if __name__ == '__main__':
    main()
