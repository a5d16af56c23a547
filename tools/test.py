"""Evaluate a checkpoint: check the inputs, then run mmdet's or mmseg's own script."""

import argparse
import sys

from ssn_plugin.engine.host_tool import add_common_arguments, test
from ssn_plugin.engine.preflight import InputError


def main() -> None:
    """Parse, check, evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Every other option (--out, --show-dir, --tta, --launcher) is handed on to\n'
        "the test script of the config's framework.\n\n"
        'example:\n'
        '  python tools/test.py configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py \\\n'
        '      work_dirs/demo/iter_1200.pth --show-dir pictures',
    )
    add_common_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    args, _ = parser.parse_known_args()
    try:
        test(args, sys.argv[1:])
    except InputError as error:
        sys.exit(f'test.py: {error}')


if __name__ == '__main__':
    main()
