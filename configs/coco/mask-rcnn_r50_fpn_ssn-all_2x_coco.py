"""Mask R-CNN R50-FPN, 2x, SSN in backbone, FPN, box head and mask head, none in the RPN."""

_base_ = ['./mask-rcnn_r50_fpn_bn-all_2x_coco.py', '../_base_/ssn_training.py']
norm_cfg = _base_.ssn_norm
model = dict(
    backbone={{_base_.ssn_r50}},
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
optim_wrapper = {{_base_.ssn_optim_wrapper}}
default_hooks = {{_base_.ssn_default_hooks}}
