"""What a study has finished and what is running: rows of a CSV file, claims, a budget of time."""

import argparse
import contextlib
import csv
import datetime
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ssn_plugin.checkpoint.whole_file import whole_file
from ssn_plugin.engine.versions import code_version

ROOT = Path(__file__).resolve().parents[1]
# At the start: a run takes minutes to hours, in which others commit.
_COMMIT = code_version(ROOT)
Row = Mapping[str, object]


def add_run_arguments(parser: argparse.ArgumentParser, study: str) -> None:
    """The arguments that the ``run.py`` of every study has.

    Args:
        parser: Gets them.
        study: Name of the study's folder.
    """
    parser.add_argument(
        '--budget-minutes',
        type=float,
        default=float('inf'),
        help='stop after about so many minutes; the next call goes on from there',
    )
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--size', choices=('cpu', 'gpu'), default='cpu', help='see README.md')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs') / 'studies' / study,
        help='logs and checkpoints, one folder per run (default: %(default)s)',
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=ROOT / 'studies' / study,
        help='folder of results.csv (default: that of the study)',
    )


def add_trained_argument(parser: argparse.ArgumentParser) -> None:
    """The argument of a ``run.py`` that goes on from the checkpoints of the study small_batches.

    Args:
        parser: Gets it.
    """
    parser.add_argument(
        '--trained',
        type=Path,
        default=Path('work_dirs') / 'studies' / 'small_batches',
        help='work dir of small_batches (default: %(default)s)',
    )


def add_analyze_arguments(
    parser: argparse.ArgumentParser, study: str, source: str = '', file: str = 'results.csv'
) -> None:
    """The arguments that the ``analyze.py`` of every study has.

    Args:
        parser: Gets them.
        study: Name of the study's folder.
        source: Name of the folder where the rows are, if that is another.
        file: What they are in.
    """
    parser.add_argument(
        '--results',
        type=Path,
        default=ROOT / 'studies' / (source or study),
        help=f'folder of {file} (default: %(default)s)',
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=ROOT / 'studies' / study,
        help='folder for the figures (default: %(default)s)',
    )


def choose_device(device: str) -> None:
    """Make mmengine, which takes a GPU whenever it sees one, use the device.

    Args:
        device: 'cpu' or 'cuda'.

    Raises:
        SystemExit: If there is no GPU.
    """
    if device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    elif not torch.cuda.is_available():
        raise SystemExit('--device: got cuda, but torch sees no GPU')


class Budget:
    """So many minutes from now on.

    Args:
        minutes: May be infinite.
    """

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def spent(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.end


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file yet.

    Args:
        path: The file.
    """
    if not path.is_file():
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def matches(row: Row, key: Row) -> bool:
    """Whether a row is that of a run.

    Args:
        row: As read or as recorded.
        key: The fields that name the run.
    """
    return all(str(row[name]) == str(value) for name, value in key.items())


def record(path: Path, key: Row, rows: Sequence[Row]) -> None:
    """Add the rows of one run to a CSV file, in place of rows that the run has there already.

    Other processes may do so at the same time, and a reader never sees half of it: the new file
    takes the place of the old one.

    Args:
        path: The file, made if missing.
        key: The fields that name the run, which every row has too.
        rows: At least one; all with the same fields, those of the file.

    Raises:
        ValueError: If the fields are not those of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.parent, wait=True):
        kept = [row for row in read(path) if not matches(row, key)]
        fields = list(rows[0])
        if kept and list(kept[0]) != fields:
            raise ValueError(f'{path}: got the fields {fields}, expected {list(kept[0])}')
        with whole_file(path) as temporary, open(temporary, 'w', newline='') as file:
            writer = csv.DictWriter(file, fields, lineterminator='\n')
            writer.writeheader()
            writer.writerows([*kept, *rows])


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process may work in a folder: True unless another one does.

    The claim ends with the block or with the process, however that ends.

    Args:
        folder: Made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, wait=False) as mine:
        yield mine


@contextlib.contextmanager
def _lock(folder: Path, wait: bool) -> Iterator[bool]:
    # The folder itself is locked, so no lock file stays behind.
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine  # outside of that try: the caller may meet a BlockingIOError of its own
    finally:
        os.close(handle)


def work_through(
    plan: Sequence[Row],
    work_dir: Path,
    results: Path,
    budget: Budget,
    execute: Callable[[Row, Path], Row | None],
) -> None:
    """Execute the runs of a plan that have no row yet, in its order, and record each.

    Several processes may share a plan: each takes the next run that nobody works on.

    Args:
        plan: The fields that name each run.
        work_dir: Gets a folder per run.
        results: The CSV file.
        budget: No run is begun once it is spent.
        execute: Gets the run and its folder; returns the other fields of its row, or None if the
            budget ended before the run did.
    """
    for key in plan:
        with claimed(work_dir / name_of(key)) as mine:
            done = any(matches(row, key) for row in read(results))
            if not mine or done:
                continue
            if budget.spent:
                return
            outcome = execute(key, work_dir / name_of(key))
            if outcome is None:
                return
            record(results, key, [{**key, **outcome}])


def name_of(key: Row) -> str:
    """Name of a run, for its folder.

    Args:
        key: The fields that name it.

    Example:
        >>> from studies.ledger import name_of
        >>> name_of(dict(size='cpu', norm='BN', batch=2, seed=0))
        'cpu_BN_batch2_seed0'
    """
    return '_'.join(
        str(value) if isinstance(value, str) else f'{name}{value}' for name, value in key.items()
    )


def provenance(device: str) -> dict[str, str]:
    """Day, device, versions and commit, for a row.

    Args:
        device: 'cpu' or 'cuda'.
    """
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d'),
        'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
        'threads': str(torch.get_num_threads()),
        'torch': torch.__version__,
        'commit': _COMMIT,
    }
