"""What inference costs once SSN is collapsed and folded: R50-FPN features and DeepLabV3+ R50.

    python benchmarks/deployment.py                  # CPU
    python benchmarks/deployment.py --device cuda

Networks are those of the shipped configs with random weights, their running statistics from one
random batch; batch 1, 512 x 1024. Of Mask R-CNN backbone and neck are timed, of DeepLabV3+ all up
to the logits. Three selections: every layer BN, every layer LN, and thirds of IN, LN and BN drawn
with a fixed seed, mean and variance of a layer alike. A fourth draws thirds for means and variances
separately, so that most layers become ``SelectedNorm``; of it only the end is timed.

Everything is compared with the network that has BatchNorm in the first place, folded by mmcv.
Before it is timed, what was collapsed and folded must compute what the network before did.
"""

import argparse
import copy
import functools
import random
import sys
from collections import defaultdict

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from parity import require_parity
from records import provenance, write
from timing import interleaved, seconds, spread
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from training_step import CONFIGS, NETWORKS, replace_norm

from ssn_plugin import SSN, collapse_ssn, find_foldable, fold_batch_norms, set_radius

BASELINE = 'BN, folded'
APART = 'thirds, mean and variance apart'
SELECTIONS = ('all BN', 'all LN', 'thirds', APART)
# A network of 70 layers in float32 gathers more rounding than one layer.
TOLERANCE = 1e-4


def built(network: str, norm: str, device: torch.device) -> nn.Module:
    """A model as after some training, in evaluation.

    Args:
        network: Of NETWORKS.
        norm: 'SSN', undecided at radius 0, or 'BN' in the same network.
        device: Where.
    """
    scope, name = NETWORKS[network]
    init_default_scope(scope)
    cfg = Config.fromfile(CONFIGS / name.format(norm='ssn')).model
    cfg.backbone.init_cfg = None
    cfg.pop('pretrained', None)
    if norm == 'BN':
        for kind in ('SSN', 'SyncSSN'):
            replace_norm(cfg, kind, dict(type='BN'))
    torch.manual_seed(0)
    model = MODELS.build(cfg).to(device).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SSN):
                for parameter in (module.mean_weight, module.var_weight):
                    nn.init.uniform_(parameter, 0, 0.2)
            elif hasattr(module, 'momentum'):
                module.momentum = None  # a cumulative average, of one batch here
        features(network, model, torch.randn(2, 3, 128, 256, device=device))
    return model.eval()


def features(network: str, model: nn.Module, x: Tensor) -> object:
    """What is timed.

    Args:
        network: Of NETWORKS.
        model: Of :func:`built`.
        x: Images.
    """
    return model.extract_feat(x) if network == 'mask-rcnn' else model(x)


def decided(model: nn.Module, selection: str) -> nn.Module:
    """A copy whose layers have chosen.

    Args:
        model: With SSN.
        selection: Of SELECTIONS.
    """
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, SSN)]
    drawn = random.Random(0)

    def draw() -> list[str]:
        if not selection.startswith('thirds'):
            return [selection.removeprefix('all ')] * len(layers)
        thirds = [('IN', 'LN', 'BN')[i % 3] for i in range(len(layers))]
        drawn.shuffle(thirds)
        return thirds

    means = draw()
    variances = draw() if selection == APART else means
    with torch.no_grad():
        for layer, mean, var in zip(layers, means, variances, strict=True):
            for control, choice in ((layer.mean_weight, mean), (layer.var_weight, var)):
                control.zero_()[layer.normalizers.index(choice)] = 1
    set_radius(model, 1.0)
    return model


def relative_difference(ours: object, theirs: object) -> float:
    """Largest difference of two lists of maps, over the largest value of the map.

    Args:
        ours: Any nesting of tensors.
        theirs: The same of what they should be.
    """
    pairs = zip(tree_flatten(ours)[0], tree_flatten(theirs)[0], strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@torch.no_grad()
def variants(
    network: str, x: Tensor, selections: list[str], device: torch.device
) -> dict[tuple[str, str], nn.Module]:
    """(selection, form) -> model, each checked against the one that it comes from.

    Args:
        network: Of NETWORKS.
        x: Images, for the check and to find what can be folded.
        selections: Of SELECTIONS.
        device: Where.
    """

    def run(model: nn.Module) -> object:
        return features(network, model, x)

    def checked(model: nn.Module, expected: object) -> nn.Module:
        difference = relative_difference(run(model), expected)
        if not difference <= TOLERANCE:
            sys.exit(f'{network}: outputs differ by {difference:.1e}, so nothing was measured')
        return model

    plain = built(network, 'BN', device)
    found = {('', 'BN'): plain}
    found['', BASELINE] = checked(fuse_conv_bn(copy.deepcopy(plain)), run(plain))
    undecided = built(network, 'SSN', device)
    found['', 'SSN undecided'] = undecided
    for selection in selections:
        model = decided(undecided, selection)
        expected = run(model)
        collapsed = checked(collapse_ssn(copy.deepcopy(model)), expected)
        if selection != APART:
            found[selection, 'SSN decided'] = model
            found[selection, 'collapsed'] = collapsed
        pairs = find_foldable(collapsed, run)
        if pairs:
            folded = fold_batch_norms(copy.deepcopy(collapsed), pairs)
            found[selection, 'collapsed, folded'] = checked(folded, expected)
    return found


def timed(network: str, model: nn.Module, x: Tensor, device: torch.device) -> dict[str, float]:
    """Seconds of one inference.

    Args:
        network: Of NETWORKS.
        model: Of :func:`built`.
        x: Images.
        device: Where.
    """
    with torch.inference_mode():
        return {'s': seconds(lambda: features(network, model, x), device)}


def main() -> None:
    """Parse, check parity, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: %(default)s)')
    parser.add_argument('--height', type=int, default=512, help='default: %(default)s')
    parser.add_argument('--width', type=int, default=1024, help='default: %(default)s')
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument('--selections', nargs='+', choices=SELECTIONS, default=SELECTIONS)
    parser.add_argument('--rounds', type=int, default=20, help='rounds per network, at most')
    parser.add_argument('--seconds', type=float, default=100, help='per network, about')
    args = parser.parse_args()
    device = torch.device(args.device)
    require_parity(device)
    origin = provenance(device)
    rows = []
    for network in args.networks:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 3, args.height, args.width, generator=generator).to(device)
        models = variants(network, x, args.selections, device)
        steps = {
            key: functools.partial(timed, network, model, x, device)
            for key, model in models.items()
        }
        times = defaultdict(list)
        for key, figures in interleaved(steps, args.rounds, args.seconds):
            times[key].append(figures['s'])
        base, mixed = times['', BASELINE], times['', 'SSN undecided']
        for selection, form in models:
            values = times[selection, form]
            taken = spread(values)
            ratio = spread([a / b for a, b in zip(values, base, strict=True)])
            to_undecided = spread([a / b for a, b in zip(values, mixed, strict=True)])
            rows.append(
                {
                    'network': network,
                    'images': f'1x3x{args.height}x{args.width}',
                    'selection': selection,
                    'form': form,
                    's': f'{taken.median:.4f}',
                    's_p20': f'{taken.p20:.4f}',
                    's_p80': f'{taken.p80:.4f}',
                    'ratio': f'{ratio.median:.4f}',
                    'ratio_p20': f'{ratio.p20:.4f}',
                    'ratio_p80': f'{ratio.p80:.4f}',
                    'to_undecided': f'{to_undecided.median:.4f}',
                    'to_undecided_p20': f'{to_undecided.p20:.4f}',
                    'to_undecided_p80': f'{to_undecided.p80:.4f}',
                    'rounds': len(values),
                    **origin,
                }
            )
            print(
                f'{network:14} {selection:32} {form:18} {taken.median:8.3f} s, '
                f'{ratio.median:.3f} x {BASELINE} ({ratio.p20:.3f} to {ratio.p80:.3f}), '
                f'{to_undecided.median:.3f} x undecided, {len(values)} rounds',
                flush=True,
            )
    print(f'written to {write(f"deployment_{device.type}", rows)}')


if __name__ == '__main__':
    main()
