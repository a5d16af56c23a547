"""The report of a work dir that a user names, with what only mmengine can read of it."""

from pathlib import Path

from mmengine.config import Config

from ssn_plugin.analysis.history import HISTORY_FILE
from ssn_plugin.analysis.run_report import dumped_config, write_run_report
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.selection_sources import rows_of


def write_report(work_dir: Path, path: Path | None = None) -> Path:
    """Write the report of a training that has ended, was interrupted, or still runs.

    Args:
        work_dir: Folder of the training. Where it has no history of ``SSNRatioHook``, the last
            checkpoint tells what was chosen.
        path: File to write, ``report.html`` in that folder by default.

    Raises:
        InputError: If the folder has nothing to tell.
        HistoryError: If its history cannot be read.
    """
    if not work_dir.is_dir():
        raise InputError(f'work_dir: no such folder: {work_dir}')
    rows = None
    if not (work_dir / HISTORY_FILE).is_file():
        try:
            rows = rows_of(str(work_dir))
        except (CheckpointError, InputError) as error:
            raise InputError(f'{work_dir}: has no {HISTORY_FILE}, and {error}') from error
    return write_run_report(work_dir, _read_config(dumped_config(work_dir)), rows, path)


def _read_config(path: Path | None) -> Config | None:
    if path is None:
        return None
    try:
        # The packages that it imports may be missing here, and the report builds nothing.
        return Config.fromfile(str(path), import_custom_modules=False)
    except Exception:
        # A dumped config may hold values that are no valid Python; its text can still be shown.
        return None
