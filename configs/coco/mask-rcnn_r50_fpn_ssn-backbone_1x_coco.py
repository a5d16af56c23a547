"""Mask R-CNN R50-FPN, 1x, SSN in the backbone."""

_base_ = ['./mask-rcnn_r50_fpn_bn-backbone_1x_coco.py', '../_base_/ssn_training.py']
model = dict(backbone={{_base_.ssn_r50}})
optim_wrapper = {{_base_.ssn_optim_wrapper}}
default_hooks = {{_base_.ssn_default_hooks}}
