"""Make the demo data set: real objects composed on photographs, in COCO, Cityscapes, ADE layout.

Example:
    python tools/make_demo_dataset.py data/demo
"""

import argparse
import sys
import time

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.clone import import_demo_data


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Make a small data set for detection and segmentation from the photographs '
        'inside scikit-image (no downloads), in the layouts of COCO, Cityscapes and ADE20K.',
        epilog='example: python tools/make_demo_dataset.py data/demo --train 400 --val 80',
    )
    parser.add_argument('out', metavar='OUT', help='folder to make, new or empty')
    parser.add_argument('--train', type=int, default=400, metavar='N', help='default: %(default)s')
    parser.add_argument('--val', type=int, default=80, metavar='N', help='default: %(default)s')
    parser.add_argument(
        '--size',
        type=int,
        default=160,
        metavar='PIXELS',
        help='width of a scene, a multiple of 32; its height is about 4/5 of it (default: 160)',
    )
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace a demo data set of other settings'
    )
    return parser.parse_args()


def show_progress(done: int, total: int) -> None:
    """One line that counts up on a terminal, five lines in a log file."""
    if sys.stderr.isatty():
        print(f'\rscenes: {done}/{total}', end='' if done < total else '\n', file=sys.stderr)
    elif done * 5 // total > (done - 1) * 5 // total:
        print(f'scenes: {done}/{total}', file=sys.stderr)


def main() -> int:
    args = parse_args()
    start = time.monotonic()
    try:
        written = import_demo_data().make_demo_dataset(
            args.out,
            num_train=args.train,
            num_val=args.val,
            size=args.size,
            seed=args.seed,
            overwrite=args.overwrite,
            progress=show_progress,
        )
    except (InputError, ImportError, ValueError, OSError) as error:
        print(f'make_demo_dataset.py: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f'\nmake_demo_dataset.py: interrupted; nothing was written to {args.out}',
            file=sys.stderr,
        )
        return 1
    if written:
        print(
            f'demo data set of {args.train} + {args.val} scenes written to {args.out} '
            f'in {time.monotonic() - start:.0f} s'
        )
    else:
        print(f'{args.out} already holds this demo data set')
    return 0


if __name__ == '__main__':
    sys.exit(main())
