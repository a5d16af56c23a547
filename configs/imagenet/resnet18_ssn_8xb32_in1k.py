"""ResNet-18 with SSN, 100 epochs of ImageNet on 8 x 32 images."""

_base_ = [
    '../_base_/models/resnet18_cls.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/imagenet_100e.py',
    '../_base_/classification_runtime.py',
    '../_base_/ssn_training.py',
]
model = dict(
    backbone=dict(
        # The running statistics move by 0.003 a step, as the authors trained: an average over the
        # last 330 batches. At 2 images per GPU the usual 0.1 would average 20 images.
        norm_cfg=dict(_base_.ssn_norm, _delete_=True, momentum=0.003),
    ),
)
optim_wrapper = {{_base_.ssn_optim_wrapper}}
default_hooks = {{_base_.ssn_default_hooks}}
custom_hooks = [
    _base_.custom_hooks[0],
    # As in ssn_training.py, with fewer records: a run has 500k iterations.
    dict(type='SSNRatioHook', interval=100),
    _base_.custom_hooks[2],
    _base_.custom_hooks[3],
]
