"""Write the report of a training as one HTML file: after it has ended, or while it runs."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from ssn_plugin.analysis.history import HistoryError
from ssn_plugin.errors import InputError
from ssn_plugin.jobs.report import write_report


def main() -> None:
    """Parse, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__ + ' It shows config, schedule, curves, and what each layer chose.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example:\n  python tools/report.py work_dirs/demo-det --out report.html',
    )
    parser.add_argument('work_dir', metavar='WORK_DIR', type=Path, help='folder of the training')
    parser.add_argument(
        '--out', metavar='FILE', type=Path, help='file to write (default: WORK_DIR/report.html)'
    )
    args = parser.parse_args()
    try:
        with Console(stderr=True).status('drawing'):
            path = write_report(args.work_dir, args.out)
    except (HistoryError, InputError) as error:
        sys.exit(f'report.py: {error}')
    except OSError as error:
        sys.exit(f'report.py: cannot write {args.out or args.work_dir}: {error.strerror}')
    print(path)


if __name__ == '__main__':
    main()
