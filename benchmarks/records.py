"""Rows of results/*.csv: every figure with the commit, the versions and the device it is from."""

import csv
import datetime
import platform
from pathlib import Path

import torch

from ssn_plugin.engine.versions import code_version

RESULTS = Path(__file__).parent / 'results'
_COMMIT = code_version(RESULTS.parent)  # that of the code which is going to run


def provenance(device: torch.device) -> dict[str, str]:
    """Commit, date, versions and device.

    Args:
        device: Where it was measured.
    """
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'{_processor()}, {torch.get_num_threads()} threads'
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d'),
        'commit': _COMMIT,
        'torch': torch.__version__,
        'device': name,
    }


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()


def write(name: str, rows: list[dict]) -> Path:
    """Write rows to results/NAME.csv, replacing what an earlier run on that device type wrote.

    Args:
        name: Name of the file without its suffix.
        rows: At least one; all with the same keys.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f'{name}.csv'
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    return path
