"""Draw how a training came to its choices: paths in the simplex, loss and decided layers."""

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from ssn_plugin.analysis.history import HistoryError, read_history
from ssn_plugin.analysis.history_plots import write_history_figures


def main() -> None:
    """Parse, read, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__ + ' It reads the ratios.jsonl that SSNRatioHook writes.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example:\n  python tools/plot_ratio_history.py work_dirs/demo-det --gif',
    )
    parser.add_argument('work_dir', metavar='WORK_DIR', type=Path, help='folder of the training')
    parser.add_argument(
        '--out', metavar='DIR', type=Path, help='folder for the figures (default: WORK_DIR)'
    )
    parser.add_argument('--gif', action='store_true', help='also animate the paths')
    args = parser.parse_args()
    out = args.out or args.work_dir
    try:
        history = read_history(args.work_dir)
        out.mkdir(parents=True, exist_ok=True)
        progress = partial(track, description='drawing', console=Console(stderr=True))
        written = write_history_figures(
            history, args.work_dir.resolve().name, out, args.gif, progress
        )
    except HistoryError as error:
        sys.exit(f'plot_ratio_history.py: {error}')
    except OSError as error:
        sys.exit(f'plot_ratio_history.py: --out: cannot write to {out}: {error.strerror}')
    for path in written:
        print(path)


if __name__ == '__main__':
    main()
