"""What a whole training step costs with SSN, BN, GN and SN: Mask R-CNN R50-FPN and DeepLabV3+ R50.

    python benchmarks/training_step.py                                   # CPU, reduced images
    python benchmarks/training_step.py --device cuda --height 800 --width 1344 --rois 512

Models and optimizers are those of the shipped configs, from random weights, with nothing frozen;
images and labels are random. A step is forward, losses, backward and optimizer: ``train_step``.

What random features propose would decide how much the mask head and non-maximum suppression have to
do. So every image has as many objects as its share of positive regions, and few proposals go in.
"""

import argparse
import functools
from collections import defaultdict
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from parity import require_parity
from records import provenance, write
from timing import interleaved, seconds, spread
from torch import nn

from ssn_plugin import SSN, set_radius

CONFIGS = Path(__file__).parent.parent / 'configs'
NETWORKS = {
    'mask-rcnn': ('mmdet', 'coco/mask-rcnn_r50_fpn_{norm}-all_2x_coco.py'),
    'deeplabv3plus': (
        'mmseg',
        'cityscapes/deeplabv3plus_r50-d8_{norm}-all_4xb2-80k_cityscapes-512x1024.py',
    ),
}


def built(network: str, norm: str, rois: int, device: torch.device) -> tuple[nn.Module, object]:
    """A model and its optimizer wrapper.

    Args:
        network: Of NETWORKS.
        norm: 'BN', 'SSN undecided', 'SSN decided', 'GN' or 'SN'.
        rois: Regions per image that the heads of a detector are trained on.
        device: Where.
    """
    scope, name = NETWORKS[network]
    init_default_scope(scope)
    stem = norm.split()[0].lower()
    if network == 'deeplabv3plus' and stem == 'bn':
        name = name.replace('{norm}-all', 'syncbn')
    cfg = Config.fromfile(CONFIGS / name.format(norm=stem))
    cfg.model.backbone.init_cfg = None
    cfg.model.backbone.pop('pretrained', None)
    cfg.model.pop('pretrained', None)
    # Live statistics in every norm: mmdet would freeze those of BN, and so compare another task.
    cfg.model.backbone.norm_eval = False
    cfg.model.backbone.frozen_stages = -1
    if network == 'mask-rcnn':
        cfg.model.train_cfg.rcnn.sampler.num = rois
        cfg.model.train_cfg.rpn_proposal.nms_pre = rois
    else:
        cfg.model.data_preprocessor.update(size=None, size_divisor=1)  # not padded to the crop size
    if stem == 'bn':
        replace_norm(
            cfg.model, 'SyncBN', dict(type='BN')
        )  # of one process it is BN, and needs no GPU
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).to(device).train()
    if norm.startswith('SSN'):
        # A third of the way, or all layers decided, by control parameters drawn at random.
        for module in model.modules():
            if isinstance(module, SSN):
                for parameter in (module.mean_weight, module.var_weight):
                    nn.init.uniform_(parameter, 0, 0.2)
        set_radius(model, 1.0 if norm == 'SSN decided' else 0.3)
    return model, build_optim_wrapper(model, cfg.optim_wrapper)


def replace_norm(node: object, old: str, new: dict) -> None:
    """Another norm wherever a config names that one.

    Args:
        node: A config or a part of one; changed in place.
        old: Type of the norm that is replaced.
        new: What stands there instead.
    """
    if isinstance(node, dict):
        if node.get('type') == old:
            node.clear()
            node.update(new)
        for child in node.values():
            replace_norm(child, old, new)
    elif isinstance(node, list | tuple):
        for child in node:
            replace_norm(child, old, new)


def batch(network: str, height: int, width: int, rois: int) -> dict:
    """Two random images and labels.

    Args:
        network: Of NETWORKS.
        height: Of the images.
        width: Of the images.
        rois: As for :func:`built`.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        for _ in range(2)
    ]
    if network == 'mask-rcnn':
        samples = [_detection_sample(height, width, rois // 4, generator) for _ in range(2)]
    else:
        samples = [_segmentation_sample(height, width, generator) for _ in range(2)]
    return {'inputs': inputs, 'data_samples': samples}


def _detection_sample(height: int, width: int, count: int, generator: torch.Generator):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    corner = torch.rand(count, 2, generator=generator) * 0.6
    extent = 0.1 + 0.25 * torch.rand(count, 2, generator=generator)
    boxes = torch.cat([corner, corner + extent], 1) * torch.tensor([width, height] * 2)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(
        metainfo=dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
    )
    sample.gt_instances = InstanceData(
        bboxes=boxes,
        labels=torch.randint(0, 80, (count,), generator=generator),
        masks=BitmapMasks(masks.numpy(), height, width),
    )
    return sample


def _segmentation_sample(height: int, width: int, generator: torch.Generator):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
    labels = torch.randint(0, 19, (1, height, width), generator=generator)
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


def run_once(model: nn.Module, optim_wrapper: object, data: dict, device: torch.device) -> dict:
    """Seconds of one training step.

    Args:
        model: Of :func:`built`.
        optim_wrapper: Of :func:`built`.
        data: Of :func:`batch`.
        device: Where.
    """
    torch.manual_seed(0)  # the same samples of proposals for every norm
    return {'step': seconds(lambda: model.train_step(data, optim_wrapper), device)}


def main() -> None:
    """Parse, check parity, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: %(default)s)')
    parser.add_argument('--height', type=int, default=256, help='default: %(default)s')
    parser.add_argument('--width', type=int, default=416, help='default: %(default)s')
    parser.add_argument(
        '--rois', type=int, default=64, help='per image in Mask R-CNN (default: %(default)s)'
    )
    parser.add_argument('--rounds', type=int, default=12, help='rounds per network, at most')
    parser.add_argument('--seconds', type=float, default=70, help='per network, about')
    args = parser.parse_args()
    device = torch.device(args.device)
    require_parity(device)
    origin = provenance(device)
    rows = []
    for network in NETWORKS:
        data = batch(network, args.height, args.width, args.rois)
        steps = {
            norm: functools.partial(
                run_once, *built(network, norm, args.rois, device), data, device
            )
            for norm in ('BN', 'SSN undecided', 'SSN decided', 'GN', 'SN')
        }
        times = defaultdict(list)
        for norm, figures in interleaved(steps, args.rounds, args.seconds):
            times[norm].append(figures['step'])
        for norm, values in times.items():
            taken = spread(values)
            ratio = spread([a / b for a, b in zip(values, times['BN'], strict=True)])
            rows.append(
                {
                    'network': network,
                    'images': f'2x3x{args.height}x{args.width}',
                    'rois': args.rois if network == 'mask-rcnn' else '',
                    'norm': norm,
                    's': f'{taken.median:.4f}',
                    's_p20': f'{taken.p20:.4f}',
                    's_p80': f'{taken.p80:.4f}',
                    'ratio': f'{ratio.median:.4f}',
                    'ratio_p20': f'{ratio.p20:.4f}',
                    'ratio_p80': f'{ratio.p80:.4f}',
                    'rounds': len(values),
                    **origin,
                }
            )
            print(
                f'{network:14} {norm:14} {taken.median:8.3f} s, {ratio.median:.3f} x BN '
                f'({ratio.p20:.3f} to {ratio.p80:.3f}, {len(values)} rounds)',
                flush=True,
            )
    print(f'written to {write(f"training_step_{device.type}", rows)}')


if __name__ == '__main__':
    main()
