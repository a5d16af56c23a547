"""Whether memory stays flat: the demo's Mask R-CNN for some hundred iterations on the CPU.

    python benchmarks/soak.py                     # 300 iterations, 5 to 10 minutes on 2 cores
    python benchmarks/soak.py --iterations 1000

Resident memory of the process is read after every iteration; data are loaded in the process itself.
The radius grows over the run as in any other, so layers are undecided, become frozen and are frozen
in it. The slope is that of a least-squares line through the iterations after the warm-up, the first
third. Exits with 1 if it is above the limit.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from records import provenance, write

from ssn_plugin import SSN
from ssn_plugin.demo_data import make_demo_dataset

CONFIG = Path(__file__).parents[1] / 'configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py'


class MemoryHook(Hook):
    """Notes resident memory in MB, and the number of layers that are frozen."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.resident: list[float] = []
        self.frozen: list[int] = []

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Note.

        Args:
            runner: mmengine's Runner.
            batch_idx: Unused.
            data_batch: Unused.
            outputs: Unused.
        """
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        self.resident.append(pages * os.sysconf('SC_PAGE_SIZE') / 2**20)
        layers = [module for module in runner.model.modules() if isinstance(module, SSN)]
        self.frozen.append(sum(int(layer.mean_fixed * layer.var_fixed) for layer in layers))


def slope(values: list[float]) -> float:
    """Of the least-squares line through the values, per 100 of them.

    Args:
        values: One per iteration.
    """
    y = torch.tensor(values, dtype=torch.float64)
    t = torch.arange(len(values), dtype=torch.float64) / 100
    t = t - t.mean()
    return float((t * y).sum() / t.square().sum())


def soak(iterations: int, batch_size: int, folder: Path) -> MemoryHook:
    """Train in a folder.

    Args:
        iterations: How many.
        batch_size: Images of each.
        folder: For data and logs.
    """
    make_demo_dataset(folder / 'data/demo', num_train=60, num_val=3)
    config = Config.fromfile(CONFIG)
    config.work_dir = str(folder / 'run')
    config.train_cfg.update(max_iters=iterations, val_interval=iterations)
    config.train_dataloader.update(batch_size=batch_size, num_workers=0, persistent_workers=False)
    config.val_dataloader = config.val_evaluator = config.val_cfg = None
    config.test_dataloader = config.test_evaluator = config.test_cfg = None
    config.train_dataloader.dataset.data_root = str(folder / config.data_root)
    config.default_hooks.checkpoint.interval = max(iterations // 6, 1)
    runner = Runner.from_cfg(config)
    runner.register_hook(hook := MemoryHook())
    runner.train()
    return hook


def main() -> None:
    """Parse, train, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--iterations', type=int, default=300)
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--limit', type=float, default=10.0, help='MB per 100 iterations')
    args = parser.parse_args()
    if args.iterations < 30:
        parser.error(f'--iterations: got {args.iterations}, expected at least 30')
    with tempfile.TemporaryDirectory() as folder:
        hook = soak(args.iterations, args.batch_size, Path(folder))
    after = hook.resident[args.iterations // 3 :]
    row = {
        'iterations': args.iterations,
        'images': args.batch_size,
        'resident_after_warm_up_mb': round(after[0], 1),
        'resident_at_end_mb': round(after[-1], 1),
        'largest_mb': round(max(hook.resident), 1),
        'slope_mb_per_100_iterations': round(slope(after), 2),
        'frozen_after_warm_up': hook.frozen[args.iterations // 3],
        'frozen_at_end': hook.frozen[-1],
        **provenance(torch.device('cpu')),
    }
    for name, value in row.items():
        print(f'{name:28} {value}')
    if args.iterations >= 300:
        print(f'written to {write("soak_cpu", [row])}')
    if row['slope_mb_per_100_iterations'] > args.limit:
        sys.exit(f'soak.py: memory grows by more than {args.limit} MB per 100 iterations')


if __name__ == '__main__':
    main()
