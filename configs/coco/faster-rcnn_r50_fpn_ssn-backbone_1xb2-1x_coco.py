"""Faster R-CNN R50-FPN, 1x, SSN in the backbone, on one GPU."""

_base_ = './faster-rcnn_r50_fpn_ssn-backbone_1x_coco.py'
train_dataloader = dict(batch_size=2)
# 2 images: an eighth of the learning rate for 16.
optim_wrapper = dict(optimizer=dict(lr=0.0025))
auto_scale_lr = dict(base_batch_size=2)
