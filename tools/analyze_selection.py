"""Show which normalizers the layers of one or more models chose: table, CSV, JSON, figures."""

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from ssn_plugin.analysis.comparison import differences
from ssn_plugin.analysis.selection_report import write_selection
from ssn_plugin.analysis.tables import difference_table, selection_table
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.selection_sources import rows_of


def main() -> None:
    """Parse, read, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__
        + ' A SOURCE is a checkpoint (of a training, of the SSN or SN release, an address), a work '
        'dir, CONFIG.py:CHECKPOINT, or CONFIG.py with the weights it starts from. Two or more are '
        'compared layer by layer with the first.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='examples:\n'
        '  python tools/analyze_selection.py work_dirs/demo-det --out selection\n'
        '  python tools/analyze_selection.py checkpoints/r50_ssn.pth work_dirs/mask-rcnn \\\n'
        '      --names pre-trained fine-tuned --out selection',
    )
    parser.add_argument('sources', metavar='SOURCE', nargs='+', help='whose layers to look at')
    parser.add_argument(
        '--out', metavar='DIR', type=Path, help='folder for selection.csv, .json and figures'
    )
    parser.add_argument('--names', metavar='NAME', nargs='+', help='what to call the sources')
    parser.add_argument(
        '--allow-pickle', action='store_true', help='run code that is in them, if you trust them'
    )
    args = parser.parse_args()
    names = args.names or args.sources
    if len(names) != len(args.sources):
        parser.error(f'--names: got {len(names)} names, expected {len(args.sources)}')
    if len(set(names)) < len(names):
        parser.error(f'SOURCE: got {" ".join(names)}, expected different ones, or --names')
    try:
        sources = {
            name: rows_of(source, args.allow_pickle)
            for name, source in zip(names, args.sources, strict=True)
        }
    except (CheckpointError, InputError) as error:
        sys.exit(f'analyze_selection.py: {error}')
    try:
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
        # Into a file or a pipe no line is broken.
        console = Console(width=None if sys.stdout.isatty() else 200)
        for name, rows in sources.items():
            console.print(selection_table(rows, name))
        if len(sources) > 1:
            console.print(difference_table(differences(sources), list(sources)))
        if args.out is None:
            return
        progress = partial(track, description='drawing', console=Console(stderr=True))
        written = write_selection(sources, args.out, progress)
    except OSError as error:
        sys.exit(f'analyze_selection.py: --out: cannot write {error.filename}: {error.strerror}')
    for path in written:
        print(path)


if __name__ == '__main__':
    main()
