"""Detectors and segmenters of the installed frameworks, with SSN and small enough for a test."""

import importlib
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from ssn_plugin.deploy.quiet import quiet

SIZE = 64
CLASSES = 3
WIDTHS = [8, 16, 32, 64]
SSN = dict(type='SSN')
_RESNET = {
    'backbone.depth': 18,
    'backbone.base_channels': 8,
    'backbone.stem_channels': 8,
    'backbone.norm_cfg': SSN,
}
_PYRAMID = _RESNET | {'neck.in_channels': WIDTHS, 'neck.out_channels': 32}
_DENSE = _PYRAMID | {'bbox_head.in_channels': 32, 'bbox_head.feat_channels': 64}
_CSP = {
    'backbone.widen_factor': 0.125,
    'neck.in_channels': [32, 64, 128],
    'neck.out_channels': 32,
    'bbox_head.in_channels': 32,
    'bbox_head.feat_channels': 32,
}
_TRANSFORMER = _RESNET | {
    'neck.out_channels': 32,
    'num_queries': 10,
    'test_cfg.max_per_img': 10,
    'encoder.num_layers': 1,
    'decoder.num_layers': 2,
    'encoder.layer_cfg.self_attn_cfg.embed_dims': 32,
    'encoder.layer_cfg.ffn_cfg.embed_dims': 32,
    'encoder.layer_cfg.ffn_cfg.feedforward_channels': 64,
    'decoder.layer_cfg.self_attn_cfg.embed_dims': 32,
    'decoder.layer_cfg.cross_attn_cfg.embed_dims': 32,
    'decoder.layer_cfg.ffn_cfg.embed_dims': 32,
    'decoder.layer_cfg.ffn_cfg.feedforward_channels': 64,
    'positional_encoding.num_feats': 16,
    'bbox_head.embed_dims': 32,
}
_TWO_STAGES = _PYRAMID | {
    'rpn_head.in_channels': 32,
    'rpn_head.feat_channels': 32,
    'train_cfg.rpn_proposal.nms_pre': 50,
    'train_cfg.rpn_proposal.max_per_img': 20,
    'test_cfg.rpn.nms_pre': 50,
    'test_cfg.rpn.max_per_img': 20,
    'roi_head.bbox_roi_extractor.out_channels': 32,
    'roi_head.mask_roi_extractor.out_channels': 32,
    'roi_head.mask_head.in_channels': 32,
    'roi_head.mask_head.conv_out_channels': 32,
    **{
        f'roi_head.bbox_head.{stage}.{key}': value
        for stage in range(3)
        for key, value in dict(in_channels=32, fc_out_channels=64).items()
    },
}
_PROPOSALS = _PYRAMID | {
    'rpn_head.num_proposals': 10,
    'test_cfg.rcnn.max_per_img': 10,
    'rpn_head.proposal_feature_channel': 32,
    'roi_head.bbox_roi_extractor.out_channels': 32,
    **{
        f'roi_head.bbox_head.{stage}.{key}': value
        for stage in range(6)
        for key, value in {
            'in_channels': 32,
            'feedforward_channels': 64,
            'dynamic_conv_cfg.in_channels': 32,
            'dynamic_conv_cfg.feat_channels': 8,
            'dynamic_conv_cfg.out_channels': 32,
        }.items()
    },
}
_SEGMENTER = _RESNET | {
    'decode_head.in_channels': 64,
    'decode_head.channels': 16,
    'auxiliary_head.in_channels': 32,
    'auxiliary_head.channels': 8,
}

# Name: file below .mim/configs, and settings of its model that make it small.
DETECTORS: dict[str, tuple[str, dict]] = {
    'RetinaNet': ('retinanet/retinanet_r18_fpn_1x_coco.py', _DENSE),
    'FCOS': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', _DENSE),
    'Cascade Mask R-CNN': ('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', _TWO_STAGES),
    'RTMDet-Ins': ('rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', _CSP),
    'YOLOX': ('yolox/yolox_tiny_8xb8-300e_coco.py', _CSP),
    'DETR': ('detr/detr_r50_8xb2-150e_coco.py', _TRANSFORMER | {'neck.in_channels': [64]}),
    'CenterNet': (
        'centernet/centernet_r18_8xb16-crop512-140e_coco.py',
        _RESNET
        | {
            'neck.in_channels': 64,
            'neck.num_deconv_filters': [32, 16, 8],
            'bbox_head.in_channels': 8,
            'bbox_head.feat_channels': 8,
        },
    ),
    'ATSS': ('atss/atss_r50_fpn_1x_coco.py', _DENSE),
    'GFL': ('gfl/gfl_r50_fpn_1x_coco.py', _DENSE),
    'SOLOv2': (
        'solov2/solov2_r50_fpn_1x_coco.py',
        _PYRAMID
        | {
            'mask_head.in_channels': 32,
            'mask_head.feat_channels': 64,
            'mask_head.num_grids': [8, 6, 4, 3, 2],
            'mask_head.mask_feature_head.feat_channels': 32,
            'mask_head.mask_feature_head.out_channels': 32,
        },
    ),
    'Sparse R-CNN': ('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py', _PROPOSALS),
    'Deformable DETR': (
        'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
        _TRANSFORMER | {'neck.in_channels': WIDTHS[1:], 'neck.norm_cfg': SSN},
    ),
}
SEGMENTERS: dict[str, tuple[str, dict]] = {
    'PSPNet': ('pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', _SEGMENTER),
    'UNet': (
        'unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64.py',
        {
            'backbone.base_channels': 8,
            'decode_head.in_channels': 8,
            'decode_head.channels': 8,
            'auxiliary_head.in_channels': 16,
            'auxiliary_head.channels': 8,
        },
    ),
    'HRNet-OCR': ('ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py', {}),
    'UPerNet': (
        'upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py',
        _SEGMENTER | {'decode_head.in_channels': WIDTHS},
    ),
    'EncNet': (
        'encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        _SEGMENTER | {'decode_head.in_channels': WIDTHS[1:]},
    ),
    'BiSeNetV1': ('bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py', {}),
    'Fast-SCNN': ('fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py', {}),
    'PIDNet': ('pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py', {}),
    'SegFormer': ('segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py', {}),
    'ISANet': ('isanet/isanet_r50-d8_4xb2-40k_cityscapes-512x1024.py', _SEGMENTER),
    'DDRNet': ('ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py', {}),
    'SegNeXt': ('segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py', {}),
}


def settings_of(name: str) -> Config:
    """The config of a network as it is shipped, its model made small and its BatchNorms SSN."""
    scope = 'mmdet' if name in DETECTORS else 'mmseg'
    file, changes = (DETECTORS | SEGMENTERS)[name]
    root = Path(importlib.import_module(scope).__file__).parent
    config = Config.fromfile(root / '.mim/configs' / file)
    _shrink(config.model)
    known = {key.split('.')[0] for key in changes} & config.model.keys()
    config.merge_from_dict(
        {f'model.{key}': value for key, value in changes.items() if key.split('.')[0] in known}
    )
    config.model.data_preprocessor.pop('batch_augments', None)
    if scope == 'mmseg':
        config.model.data_preprocessor.size = (SIZE, SIZE)
        config.model.test_cfg = dict(mode='whole')
    return config


def _shrink(node: object) -> None:
    """No weights to download, few classes, SSN for BatchNorm, nothing frozen."""
    if isinstance(node, dict):
        for key in ('init_cfg', 'pretrained', 'class_weight', 'min_kept'):
            value = node.get(key)
            if isinstance(value, str | list | int) or (
                isinstance(value, dict) and 'checkpoint' in value
            ):
                node.pop(key)
        if node.get('type') in ('BN', 'SyncBN'):
            node.type = 'SSN'
            node.pop('requires_grad', None)
        for key, value in dict(num_classes=CLASSES, norm_eval=False, frozen_stages=-1).items():
            if key in node:
                node[key] = value
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list | tuple):
            _shrink(child)


def network(name: str) -> nn.Module:
    """A network of :data:`DETECTORS` or :data:`SEGMENTERS`."""
    config = settings_of(name)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    with quiet(MMLogger.get_current_instance()):
        model.init_weights()
    return model


def batch_for(name: str, truth: bool = True) -> dict:
    """Two images with what is to be found in them, or with nothing."""
    images = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8) for _ in range(2)]
    sample = _detection_sample if name in DETECTORS else _segmentation_sample
    return dict(inputs=images, data_samples=[sample(truth) for _ in images])


_META = dict(
    img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE), scale_factor=(1.0, 1.0),
    batch_input_shape=(SIZE, SIZE), border=[0, SIZE, 0, SIZE],
)  # fmt: skip


def _detection_sample(truth: bool) -> object:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 10.0, 60.0, 58.0]])[: 2 * truth]
    masks = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.uint8)
    for mask, box in zip(masks, boxes.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
    sample = DetDataSample(metainfo=_META)
    sample.gt_instances = InstanceData(
        bboxes=boxes,
        labels=torch.tensor([0, 2])[: len(boxes)],
        masks=BitmapMasks(masks.numpy(), SIZE, SIZE),
    )
    sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=torch.zeros(0).long())
    return sample


def _segmentation_sample(truth: bool) -> object:
    from mmseg.structures import SegDataSample

    labels = torch.full((1, SIZE, SIZE), 255)
    if truth:
        labels[:, : SIZE // 2], labels[:, SIZE // 2 :, 10:] = 0, 2
    sample = SegDataSample(metainfo=_META)
    sample.gt_sem_seg = PixelData(data=labels)
    sample.gt_edge_map = PixelData(data=(labels == 2).long())
    return sample
