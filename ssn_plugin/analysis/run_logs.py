"""The numbers that mmengine logged in a work dir: losses, learning rate, validation metrics."""

import json
from pathlib import Path
from typing import NamedTuple

_TIMES = ('time', 'data_time', 'step', 'iter', 'epoch', 'memory')


class RunLogs(NamedTuple):
    """What was logged.

    Attributes:
        train: Iteration -> names and values, in order.
        val: The same of validations, at the iteration before them.
        starts: Names of the folders that the run, and each resumption of it, logged to. A training
            that was begun anew in the same work dir is another run.
    """

    train: dict[int, dict[str, float]]
    val: dict[int, dict[str, float]]
    starts: list[str]


def read_run_logs(work_dir: Path) -> RunLogs:
    """Read ``*/vis_data/scalars.json``, which mmengine's LocalVisBackend writes.

    Where a resumed run repeats iterations, its numbers count. Lines that a kill cut off are left
    out.
    """
    train: dict[int, dict[str, float]] = {}
    val: dict[int, dict[str, float]] = {}
    starts = []
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        iteration = 0
        resumed = False
        for text in file.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            values = {
                name: float(value)
                for name, value in line.items()
                if isinstance(value, int | float)
                and name not in _TIMES
                and not name.startswith('ssn/')
            }
            if not values:
                continue
            if 'lr' not in values and 'loss' not in values:
                # The step of a validation may be an epoch, or nothing.
                if iteration or not starts:
                    val[iteration] = values
                continue
            iteration = int(line.get('step', line.get('iter', 0)))
            if not resumed:
                train = {i: v for i, v in train.items() if i < iteration}
                val = {i: v for i, v in val.items() if i < iteration}
                resumed = True
                if starts and (not train or _begun_anew(file)):
                    train, val, starts = {}, {}, []
                starts.append(file.parts[-3])
            train[iteration] = values
    return RunLogs(train, val, starts)


def _begun_anew(log: Path) -> bool:
    """Whether the config that mmengine dumps beside the numbers says that it did not resume."""
    config = log.with_name('config.py')
    return (
        config.is_file()
        and 'resume = False' in config.read_text(encoding='utf-8', errors='replace').splitlines()
    )
