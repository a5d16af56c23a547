"""Faster R-CNN R50-FPN, 1x, GroupNorm in the backbone."""

_base_ = './faster-rcnn_r50_fpn_bn-backbone_1x_coco.py'
model = dict(backbone={{_base_.gn_r50}})
