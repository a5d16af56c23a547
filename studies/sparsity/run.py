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
from ssn_plugin.checkpoint.files import CheckpointError, read_checkpoint, weights_in
from ssn_plugin.engine.preflight import InputError, check_data
from studies.ledger import (
    ROOT,
    Budget,
    Row,
    add_run_arguments,
    choose_device,
    name_of,
    provenance,
    read,
    work_through,
)
from studies.small_batches.run import config_of


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


def evaluate_one(run: Row, data: Path, trained: Path, device: str) -> Row:
    """Evaluate the last checkpoint of one run, as it is and collapsed.

    Args:
        run: An entry of the plan.
        data: Folder with val/CLASS/*.
        trained: Work dir of the study on small batches.
        device: 'cpu' or 'cuda'.
    """
    config = config_of(run, data, trained)
    path = trained / name_of(run) / f'epoch_{config.train_cfg.max_epochs}.pth'
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.load_state_dict(weights_in(read_checkpoint(path), str(path)))
    model.to(device).eval()
    collapsed = collapse_ssn(copy.deepcopy(model))
    before, labels = logits(model, config)
    after, _ = logits(collapsed, config)
    classes = before.argmax(1), after.argmax(1)
    top1 = [f'{100 * (found == labels).double().mean().item():.2f}' for found in classes]
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
    parser.add_argument(
        '--trained',
        type=Path,
        default=Path('work_dirs/studies/small_batches'),
        help='work dir of small_batches (default: %(default)s)',
    )
    parser.add_argument(
        '--trained-results',
        type=Path,
        default=ROOT / 'studies/small_batches',
        help='folder of its results.csv (default: %(default)s)',
    )
    add_run_arguments(parser, 'sparsity')
    args = parser.parse_args()
    choose_device(args.device)
    runs = plan(args.size, read(args.trained_results / 'results.csv'))
    torch.set_num_threads(1)
    try:
        if runs:
            check_data(config_of(runs[0], args.data, args.trained), 'val')
        work_through(
            runs,
            args.work_dir,
            args.out / 'results.csv',
            Budget(args.budget_minutes),
            lambda run, _: evaluate_one(run, args.data, args.trained, args.device),
        )
    except (InputError, CheckpointError) as error:
        sys.exit(f'run.py: {error}')


if __name__ == '__main__':
    main()
