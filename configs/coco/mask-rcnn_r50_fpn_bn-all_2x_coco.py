"""Mask R-CNN R50-FPN, 2x, BatchNorm in backbone, FPN, box head and mask head, none in the RPN."""

_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py', '../_base_/backbones.py']
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone={{_base_.bn_r50}},
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
