"""Whether memory stays flat: the demo's Mask R-CNN for some hundred iterations on the CPU.

    python benchmarks/soak.py                     # 300 iterations each, 10 minutes on 2 cores
    python benchmarks/soak.py --norms SSN --iterations 1000

The same run with BN stands beside that with SSN, each in a process of its own that loads its data
itself. With SSN the radius grows over the run as in any other, so layers are undecided, become
frozen and are frozen in it. Two things are measured:

- resident: memory of the process after every iteration;
- in use: what of it the C allocator has given away, tensors above all. The rest is Python's own
  objects, mapped files, and free pages that the allocator keeps and that come and go.

Slopes are those of a least-squares line through the iterations after the warm-up, the first third.
Python's objects are counted without garbage, at the end of the warm-up and at the end of the run.

Exits with 1 if memory in use grows by more than the limit. Needs glibc 2.33 or newer.
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
from ssn_plugin.jobs.clone import import_demo_data

CONFIG = Path(__file__).parents[1] / 'configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py'


class MallInfo(ctypes.Structure):
    """What mallinfo2 of glibc returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *('arena', 'ordblks', 'smblks', 'hblks', 'hblkhd'),
            *('usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost'),
        )
    ]


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def in_use_mb() -> float:
    """What the C allocator has given to this process and not got back."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    found = mallinfo()
    return (found.uordblks + found.hblkhd) / 2**20


def python_objects() -> int:
    """Containers that Python's collector knows, without garbage."""
    gc.collect()
    return len(gc.get_objects())


class MemoryHook(Hook):
    """Notes memory, and the number of layers that are frozen.

    Args:
        iterations: Of the run.
    """

    priority = 'LOWEST'

    def __init__(self, iterations: int) -> None:
        self.warm_up = iterations // 3
        self.resident: list[float] = []
        self.in_use: list[float] = []
        self.objects: dict[int, int] = {}
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
        self.in_use.append(in_use_mb())
        layers = [module for module in runner.model.modules() if isinstance(module, SSN)]
        self.frozen.append(sum(int(layer.mean_fixed * layer.var_fixed) for layer in layers))
        if runner.iter in (self.warm_up, runner.max_iters - 1):
            self.objects[runner.iter] = python_objects()

    def row(self) -> dict[str, float]:
        """What was found."""
        resident, in_use = self.resident[self.warm_up :], self.in_use[self.warm_up :]
        (first, objects_first), (last, objects_last) = sorted(self.objects.items())
        growth = 100 * (objects_last - objects_first) / (last - first)
        return {
            'resident_after_warm_up_mb': round(resident[0], 1),
            'resident_at_end_mb': round(resident[-1], 1),
            'resident_mb_per_100_iterations': round(slope(resident), 2),
            'in_use_after_warm_up_mb': round(in_use[0], 1),
            'in_use_at_end_mb': round(in_use[-1], 1),
            'in_use_mb_per_100_iterations': round(slope(in_use), 2),
            'objects_at_end': objects_last,
            'objects_per_100_iterations': round(growth),
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
        import_demo_data().make_demo_dataset(folder / 'data/demo', num_train=60, num_val=3)
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
    parser.add_argument('--limit', type=float, default=1.0, help='MB per 100 iterations, in use')
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
        if row['in_use_mb_per_100_iterations'] > args.limit:
            sys.exit(f'soak.py: {row["norm"]}: more than {args.limit} MB per 100 iterations')


if __name__ == '__main__':
    main()
