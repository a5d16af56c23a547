"""Mask R-CNN R50-FPN, 1x, BatchNorm in the backbone: mmdet's own config."""

_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/backbones.py']
model = dict(backbone={{_base_.bn_r50}})
