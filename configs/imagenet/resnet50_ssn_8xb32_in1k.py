"""ResNet-50 with SSN, 100 epochs of ImageNet on 8 x 32 images."""

_base_ = './resnet18_ssn_8xb32_in1k.py'
model = dict(backbone=dict(depth=50), head=dict(in_channels=2048))
