"""Strip a training checkpoint to a small backbone file with a hash in its name."""

import argparse
import os
import sys

from ssn_plugin.checkpoint.layout import shown
from ssn_plugin.checkpoint.publish import publish_backbone
from ssn_plugin.checkpoint.selection import histogram
from ssn_plugin.errors import CheckpointError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/publish_backbone.py work_dirs/r50/epoch_100.pth '
        'checkpoints/r50_ssn.pth  # writes checkpoints/r50_ssn-0123abcd.pth',
    )
    parser.add_argument('source', metavar='IN', help='checkpoint of a training')
    parser.add_argument('out', metavar='OUT', help='file to write, NAME.pth: becomes NAME-HASH.pth')
    parser.add_argument(
        '--allow-pickle', action='store_true', help='run code that is in IN, if you trust it'
    )
    args = parser.parse_args()
    try:
        done = publish_backbone(args.source, args.out, args.allow_pickle)
    except CheckpointError as error:
        sys.exit(f'publish_backbone.py: {error}')
    before, after = (os.path.getsize(path) / 1e6 for path in (args.source, done.path))
    print(f'{done.path}: {done.layout}, {after:.1f} MB of {before:.1f} MB')
    counts = histogram(done.selection)
    if counts:
        print('selection: ' + ', '.join(f'{count} {pair}' for pair, count in counts.items()))
    print(f'left out: {shown(done.left_out) or "no weights"}')
    print(f'left out beside the weights: {", ".join(done.left_out_beside) or "nothing"}')


if __name__ == '__main__':
    main()
