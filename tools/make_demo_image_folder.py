"""Make a folder of class folders from the photographs inside scikit-image, for pre-training.

Example:
    python tools/make_demo_image_folder.py data/imagefolder
"""

import argparse
import sys

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.clone import import_demo_data


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Make train/CLASS/*.jpg and val/CLASS/*.jpg of 4 objects and 7 textures from '
        'the photographs inside scikit-image (no downloads).',
        epilog='example: python tools/make_demo_image_folder.py data/imagefolder --train 200',
    )
    parser.add_argument('out', metavar='OUT', help='folder to make, new or empty')
    parser.add_argument(
        '--train', type=int, default=100, metavar='N', help='per class, default: %(default)s'
    )
    parser.add_argument(
        '--val', type=int, default=25, metavar='N', help='per class, default: %(default)s'
    )
    parser.add_argument(
        '--size', type=int, default=64, metavar='PIXELS', help='default: %(default)s'
    )
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace a demo data set of other settings'
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        written = import_demo_data().make_image_folder(
            args.out,
            num_train=args.train,
            num_val=args.val,
            size=args.size,
            seed=args.seed,
            overwrite=args.overwrite,
        )
    except (InputError, ImportError, ValueError, OSError) as error:
        print(f'make_demo_image_folder.py: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f'\nmake_demo_image_folder.py: interrupted; nothing was written to {args.out}',
            file=sys.stderr,
        )
        return 1
    what = f'{args.train} + {args.val} pictures per class'
    print(f'{what} written to {args.out}' if written else f'{args.out} already holds {what}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
