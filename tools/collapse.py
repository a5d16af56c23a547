"""Replace every SSN layer of a trained model by the normalizer it chose, and check the result."""

import argparse
import os
import sys

from rich.console import Console

from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.collapse import FOLD_TOLERANCE, TOLERANCE, collapse_checkpoint
from ssn_plugin.jobs.configs import add_config_options


def main() -> None:
    """Parse, collapse, print."""
    parser = argparse.ArgumentParser(
        description=__doc__
        + ' Writes the weights to OUT and, beside it, a config of the same name that ends in .py '
        'and builds that model in tools/test.py, in the scripts and the inference APIs of mmdet, '
        'mmseg and mmpretrain. Before that it compares the outputs of both models on real images '
        'and writes nothing if they differ.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example:\n'
        '  python tools/collapse.py configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py \\\n'
        '      work_dirs/demo/iter_800.pth work_dirs/demo/collapsed.pth',
    )
    parser.add_argument('config', metavar='CONFIG', help='config of the training')
    parser.add_argument('checkpoint', metavar='CKPT', help='checkpoint of the training')
    parser.add_argument('out', metavar='OUT', help='checkpoint to write, NAME.pth')
    parser.add_argument(
        '--fold',
        action='store_true',
        help='fold BatchNorms into the convolutions before them, where nothing else reads those',
    )
    parser.add_argument(
        '--native',
        action='store_true',
        help="take torch's layers for correction=1 too, whose variance differs a little; the "
        'difference of the outputs is printed and allowed',
    )
    parser.add_argument(
        '--keep-undecided',
        action='store_true',
        help='leave layers that are still a mixture as they are, where they are an error otherwise',
    )
    parser.add_argument(
        '--plain',
        action='store_true',
        help='write config and weights that need nothing of ssn_plugin; for models in which all '
        'layers of a norm_cfg chose the same normalizer',
    )
    parser.add_argument(
        '--images',
        metavar='PATH',
        nargs='+',
        default=[],
        help="image files or folders to compare on (default: the config's test data)",
    )
    parser.add_argument(
        '--num-images',
        metavar='N',
        type=int,
        default=4,
        help='how many images of a folder or of the test data (default: %(default)s)',
    )
    parser.add_argument(
        '--tolerance',
        metavar='T',
        type=float,
        help='largest difference of an output, relative to the largest output (default: '
        f'{TOLERANCE}, with --fold {FOLD_TOLERANCE}; with --native there is none)',
    )
    add_config_options(parser)
    parser.add_argument('--overwrite', action='store_true', help='replace OUT and its config')
    parser.add_argument(
        '--allow-pickle', action='store_true', help='run code that is in CKPT, if you trust it'
    )
    args = parser.parse_args()
    if args.num_images < 1:
        parser.error(f'--num-images: got {args.num_images}, expected at least 1')
    if args.tolerance is not None and not args.tolerance >= 0:
        parser.error(f'--tolerance: got {args.tolerance}, expected a number of at least 0')
    try:
        with Console(stderr=True).status('collapsing, comparing on images'):
            done = collapse_checkpoint(
                args.config,
                args.checkpoint,
                args.out,
                args.fold,
                args.native,
                args.keep_undecided,
                args.images,
                args.num_images,
                args.tolerance,
                args.overwrite,
                args.allow_pickle,
                args.cfg_options,
                args.plain,
            )
    except (CheckpointError, InputError) as error:
        sys.exit(f'collapse.py: {error}')
    print(f'{sum(done.layers.values())} SSN layers collapsed:')
    for what, count in sorted(done.layers.items()):
        print(f'{count:4d}  {what}')
    if args.fold:
        print(f'{len(done.folded)} BatchNorms folded into convolutions')
    if done.undecided:
        print(f'{len(done.undecided)} undecided layers kept: {", ".join(done.undecided)}')
    print(done.comparison)
    height, width = done.size
    print(f'parameters: {done.before.params:,} -> {done.after.params:,}')
    print(
        f'FLOPs of one image of {height} x {width}: {done.before.flops / 1e9:.3f} G -> '
        f'{done.after.flops / 1e9:.3f} G'
    )
    before, after = (os.path.getsize(path) / 1e6 for path in (args.checkpoint, done.checkpoint))
    print(f'{done.checkpoint}: {after:.1f} MB of {before:.1f} MB')
    print(done.config)


if __name__ == '__main__':
    main()
