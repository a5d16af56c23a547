"""Export the network of a trained model to ONNX, for every batch and image size, and check it."""

import argparse
import os
import sys

from rich.console import Console

from ssn_plugin.deploy.onnx_file import DEFAULT_OPSET, ExportError
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.export import TOLERANCE, export_onnx


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> None:
    """Parse, export, print."""
    parser = argparse.ArgumentParser(
        description=__doc__
        + ' Of a detector these are backbone and neck (outputs feat0, feat1, ...), of a segmenter '
        'the whole network (output logits, as large as the image). The input is normalised images '
        '(N, 3, H, W). ONNX Runtime is compared with torch on real images, and nothing is written '
        'if they differ.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example:\n'
        '  python tools/export_onnx.py configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py \\\n'
        '      work_dirs/demo-det/iter_800.pth work_dirs/demo-det/features.onnx',
    )
    parser.add_argument('config', metavar='CONFIG', help='config of a training or a collapsed one')
    parser.add_argument('checkpoint', metavar='CKPT', help='its checkpoint')
    parser.add_argument('out', metavar='OUT', help='file to write, NAME.onnx')
    parser.add_argument(
        '--opset',
        metavar='N',
        type=int,
        default=DEFAULT_OPSET,
        help="version of ONNX's operators (default: %(default)s)",
    )
    parser.add_argument(
        '--images',
        metavar='PATH',
        nargs='+',
        default=[],
        help="image files or folders to compare on (default: the config's test data)",
    )
    parser.add_argument(
        '--tolerance',
        metavar='T',
        type=float,
        default=TOLERANCE,
        help='largest difference of an output, relative to its largest value (default: '
        '%(default)s)',
    )
    parser.add_argument(
        '--size',
        metavar=('HEIGHT', 'WIDTH'),
        type=_positive,
        nargs=2,
        help='of all images, for a network that cannot be written for every size, such as one that '
        'pools to a grid',
    )
    parser.add_argument('--batch', metavar='N', type=_positive, help='the same for images at once')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    parser.add_argument(
        '--allow-pickle', action='store_true', help='run code that is in CKPT, if you trust it'
    )
    args = parser.parse_args()
    try:
        with Console(stderr=True).status('recording the network, comparing with ONNX Runtime'):
            done = export_onnx(
                args.config,
                args.checkpoint,
                args.out,
                args.opset,
                args.images,
                args.tolerance,
                args.overwrite,
                args.allow_pickle,
                args.size and tuple(args.size),
                args.batch,
            )
    except (CheckpointError, ExportError, InputError) as error:
        sys.exit(f'export_onnx.py: {error}')
    print(f'{done.path}: {os.path.getsize(done.path) / 1e6:.1f} MB, opset {args.opset}')
    print(f'outputs: {", ".join(done.outputs)}')
    if done.layers:
        print(
            f'SSN and SN layers: {done.layers["decided"]} as what they chose, '
            f'{done.layers["undecided"]} as mixtures'
        )
    shapes = ', '.join(' x '.join(map(str, shape)) for shape in done.shapes)
    print(f'largest difference from torch: {done.difference:.1e} of the largest value ({shapes})')


if __name__ == '__main__':
    main()
