"""Evaluate a checkpoint: check the inputs, then run the script of the config's own codebase."""

import argparse
import sys

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.framework_script import add_test_arguments, test


def main() -> None:
    """Parse, check, evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example:\n'
        '  python tools/test.py configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py \\\n'
        '      work_dirs/demo/iter_800.pth --show-dir pictures',
    )
    add_test_arguments(parser)
    # What only the codebase's script knows is left to that, which parses again.
    args, _ = parser.parse_known_args()
    try:
        test(args, sys.argv[1:])
    except InputError as error:
        sys.exit(f'test.py: {error}')


if __name__ == '__main__':
    main()
