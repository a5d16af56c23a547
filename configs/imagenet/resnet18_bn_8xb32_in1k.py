"""ResNet-18 with BatchNorm, 100 epochs of ImageNet on 8 x 32 images."""

_base_ = [
    '../_base_/models/resnet18_cls.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/imagenet_100e.py',
    '../_base_/classification_runtime.py',
]
custom_imports = dict(imports=['ssn_plugin'], allow_failed_imports=False)
