"""ResNet-18 with GroupNorm, 100 epochs of ImageNet on 8 x 32 images."""

_base_ = './resnet18_bn_8xb32_in1k.py'
model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type='GN', num_groups=32)))
