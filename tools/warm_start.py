"""Convert a network with BatchNorm into one with SSN that starts (nearly) as that network."""

import argparse
import sys

from ssn_plugin.checkpoint.files import check_writable, weights_in, write_checkpoint
from ssn_plugin.checkpoint.layout import norm_layers
from ssn_plugin.checkpoint.warm_start import BN_RATIO, STEM_PADDING, batch_norm_to_ssn
from ssn_plugin.errors import CheckpointError
from ssn_plugin.layers.convert import check_warm_start
from ssn_plugin.models.pretrained import load_checkpoint
from ssn_plugin.version import __version__


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__
        + ' Every BatchNorm in IN becomes an SSN, everything else is kept; a backbone, a whole '
        'detector, a segmenter or a classifier will do. OUT is for an init_cfg or load_from.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='examples:\n'
        '  python tools/warm_start.py resnet50-0676ba61.pth checkpoints/r50_ssn_warm.pth\n'
        '  python tools/warm_start.py mask-rcnn_bn.pth out.pth --bn-ratio 1 --fix  # an exact copy',
    )
    parser.add_argument(
        'source', metavar='IN', help='file, or an address such as torchvision://resnet50'
    )
    parser.add_argument('out', metavar='OUT', help='file to write')
    parser.add_argument(
        '--bn-ratio',
        type=float,
        default=BN_RATIO,
        metavar='R',
        help='importance ratio of BN for mean and variance, in [0, 1]; the other normalizers share '
        'the rest (default: %(default)s)',
    )
    parser.add_argument(
        '--fix', action='store_true', help='freeze that choice, with --bn-ratio 1: a BN network'
    )
    parser.add_argument(
        '--normalizers',
        nargs='+',
        default=['IN', 'LN', 'BN'],
        metavar='NAME',
        help='candidates of the SSN layers, in their order (default: IN LN BN)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    parser.add_argument(
        '--allow-pickle', action='store_true', help='run code that is in IN, if you trust it'
    )
    args = parser.parse_args()
    try:
        check_warm_start(args.bn_ratio, args.normalizers)
        check_writable(args.out, args.overwrite)
        weights = weights_in(load_checkpoint(args.source, args.allow_pickle), args.source)
        state = batch_norm_to_ssn(weights, args.source, args.bn_ratio, args.fix, args.normalizers)
        meta = {
            'ssn_plugin': __version__,
            'made_by': f'warm start from BatchNorm at a ratio of {args.bn_ratio}',
            'stem_padding': STEM_PADDING,
            'bn_ratio': args.bn_ratio,
            'normalizers': list(args.normalizers),
        }
        write_checkpoint({'meta': meta, 'state_dict': state}, args.out, args.overwrite)
    except (CheckpointError, ValueError) as error:
        sys.exit(f'warm_start.py: {error}')
    count = sum(kind == 'SSN' for kind in norm_layers(state).values())
    print(f'{args.out}: {count} SSN layers with BN at an importance ratio of {args.bn_ratio}')
    print(f"in a config: init_cfg=dict(type='Pretrained', checkpoint='{args.out}')")
    print('with SSNResNet set stem_padding=1, the stem of every ResNet with BatchNorm')


if __name__ == '__main__':
    main()
