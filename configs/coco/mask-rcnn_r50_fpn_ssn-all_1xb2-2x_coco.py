"""Mask R-CNN R50-FPN, 2x, SSN in backbone, FPN, box head and mask head, on one GPU."""

_base_ = './mask-rcnn_r50_fpn_ssn-all_2x_coco.py'
train_dataloader = dict(batch_size=2)
# 2 images: an eighth of the learning rate for 16.
optim_wrapper = dict(optimizer=dict(lr=0.0025))
auto_scale_lr = dict(base_batch_size=2)
