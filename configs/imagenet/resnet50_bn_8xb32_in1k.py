"""ResNet-50 with BatchNorm, 100 epochs of ImageNet on 8 x 32 images."""

_base_ = './resnet18_bn_8xb32_in1k.py'
model = dict(backbone=dict(depth=50), head=dict(in_channels=2048))
