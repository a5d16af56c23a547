"""Tell what a checkpoint file is: origin, network, norm layers, selection, contents."""

import argparse
import sys

from ssn_plugin.checkpoint.inspection import inspect_checkpoint
from ssn_plugin.errors import CheckpointError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/inspect_checkpoint.py checkpoints/ssn_8x2_75.848.pth',
    )
    parser.add_argument('file', metavar='FILE', help='checkpoint file')
    parser.add_argument(
        '--allow-pickle', action='store_true', help='run code that is in it, if you trust it'
    )
    args = parser.parse_args()
    try:
        report = inspect_checkpoint(args.file, args.allow_pickle)
    except CheckpointError as error:
        sys.exit(f'inspect_checkpoint.py: {error}')
    width = max(map(len, report)) + 2
    for heading, text in report.items():
        print(f'{heading + ":":{width}}' + text.replace('\n', '\n' + ' ' * width))


if __name__ == '__main__':
    main()
