"""Whether memory stays flat: the demo's Mask R-CNN for some hundred iterations on the CPU.

    python benchmarks/soak.py                     # 300 iterations each, 10 minutes on 2 cores
    python benchmarks/soak.py --norms SSN --iterations 1000

The same run with BN stands beside that with SSN, each in a process of its own that loads its data
itself. With SSN the radius grows over the run as in any other, so layers are undecided, become
frozen and are frozen in it. Two things are measured:

- resident: memory of the process after every iteration, its slope that of a least-squares line
  through the iterations after the warm-up, the first third. Garbage that Python has not collected
  yet and pages that the C allocator keeps count here.
- held: what is left of it after both have been made to let go, shortly before the end of the
  warm-up and at the end of the run.

Exits with 1 if what is held grows by more than the limit.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from records import provenance, write

from ssn_plugin import SSN
from ssn_plugin.demo_data import make_demo_dataset

CONFIG = Path(__file__).parents[1] / 'configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py'


SETTLING = 30  # iterations in which the allocator takes back what it had to let go


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def held_mb() -> float:
    """The same without garbage and without free pages."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_mb()


class MemoryHook(Hook):
    """Notes memory, and the number of layers that are frozen.

    Args:
        iterations: Of the run.
    """

    priority = 'LOWEST'

    def __init__(self, iterations: int) -> None:
        self.warm_up = iterations // 3
        self.collect_at = {max(self.warm_up - SETTLING, 0), iterations - 1}
        self.resident: list[float] = []
        self.held: dict[int, float] = {}
        self.frozen: list[int] = []

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Note.

        Args:
            runner: mmengine's Runner.
            batch_idx: Unused.
            data_batch: Unused.
            outputs: Unused.
        """
        self.resident.append(resident_mb())
        layers = [module for module in runner.model.modules() if isinstance(module, SSN)]
        self.frozen.append(sum(int(layer.mean_fixed * layer.var_fixed) for layer in layers))
        if runner.iter in self.collect_at:
            self.held[runner.iter] = held_mb()

    def row(self) -> dict[str, float]:
        """What was found."""
        (first, held_first), (last, held_last) = sorted(self.held.items())
        after = self.resident[self.warm_up :]
        return {
            'resident_after_warm_up_mb': round(after[0], 1),
            'resident_at_end_mb': round(after[-1], 1),
            'resident_largest_mb': round(max(self.resident), 1),
            'resident_mb_per_100_iterations': round(slope(after), 2),
            'held_after_warm_up_mb': round(held_first, 1),
            'held_at_end_mb': round(held_last, 1),
            'held_mb_per_100_iterations': round(100 * (held_last - held_first) / (last - first), 2),
            'frozen_after_warm_up': self.frozen[self.warm_up],
            'frozen_at_end': self.frozen[-1],
        }


def slope(values: list[float]) -> float:
    """Of the least-squares line through the values, per 100 of them.

    Args:
        values: One per iteration.
    """
    y = torch.tensor(values, dtype=torch.float64)
    t = torch.arange(len(values), dtype=torch.float64) / 100
    t = t - t.mean()
    return float((t * y).sum() / t.square().sum())


def soak(norm: str, iterations: int, batch_size: int) -> dict[str, float]:
    """Train in a temporary folder; what the hook found.

    Args:
        norm: 'SSN' or 'BN', in all places.
        iterations: How many.
        batch_size: Images of each.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_demo_dataset(folder / 'data/demo', num_train=60, num_val=3)
        config = Config.fromfile(CONFIG)
        config.work_dir = str(folder / 'run')
        config.train_cfg.update(max_iters=iterations, val_interval=iterations)
        config.train_dataloader.update(
            batch_size=batch_size, num_workers=0, persistent_workers=False
        )
        config.val_dataloader = config.val_evaluator = config.val_cfg = None
        config.test_dataloader = config.test_evaluator = config.test_cfg = None
        config.train_dataloader.dataset.data_root = str(folder / config.data_root)
        config.default_hooks.checkpoint.interval = max(iterations // 6, 1)
        if norm != 'SSN':
            model, heads = config.model, config.model.roi_head
            for part in (model.backbone, model.neck, heads.bbox_head, heads.mask_head):
                part.norm_cfg = dict(type=norm)
            ours = ('SSNRadiusHook', 'SSNRatioHook')
            config.custom_hooks = [hook for hook in config.custom_hooks if hook['type'] not in ours]
        runner = Runner.from_cfg(config)
        runner.register_hook(hook := MemoryHook(iterations))
        runner.train()
        return hook.row()


def main() -> None:
    """Parse, train, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--norms', nargs='+', choices=('SSN', 'BN'), default=['SSN', 'BN'])
    parser.add_argument('--iterations', type=int, default=300)
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--limit', type=float, default=1.0, help='MB per 100 iterations, held')
    args = parser.parse_args()
    if args.iterations < 30:
        parser.error(f'--iterations: got {args.iterations}, expected at least 30')
    rows = []
    for norm in args.norms:
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
            found = process.submit(soak, norm, args.iterations, args.batch_size).result()
        row = dict(norm=norm, iterations=args.iterations, images=args.batch_size)
        rows.append(row | found | provenance(torch.device('cpu')))
    for name in rows[0]:
        print(f'{name:32}', *(f'{row[name]!s:>10}' for row in rows))
    if args.iterations >= 300 and len(rows) > 1:
        print(f'written to {write("soak_cpu", rows)}')
    for row in rows:
        if row['held_mb_per_100_iterations'] > args.limit:
            sys.exit(f'soak.py: {row["norm"]}: more than {args.limit} MB per 100 iterations')


if __name__ == '__main__':
    main()
