"""Mask R-CNN R50-FPN, 2x, GroupNorm in backbone, FPN, box head and mask head, none in the RPN."""

_base_ = './mask-rcnn_r50_fpn_bn-all_2x_coco.py'
norm_cfg = dict(type='GN', num_groups=32)
model = dict(
    backbone={{_base_.gn_r50}},
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
