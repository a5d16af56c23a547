"""Train a config of any OpenMMLab 2 codebase: check the inputs, then run its own script."""

import argparse
import sys

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.framework_script import add_train_arguments, train


def main() -> None:
    """Parse, check, train."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example:\n'
        '  python tools/train.py configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py \\\n'
        '      --work-dir work_dirs/demo --cfg-options train_dataloader.batch_size=2',
    )
    add_train_arguments(parser)
    # What only the codebase's script knows is left to that, which parses again.
    args, _ = parser.parse_known_args()
    try:
        train(args, sys.argv[1:])
    except InputError as error:
        sys.exit(f'train.py: {error}')


if __name__ == '__main__':
    main()
