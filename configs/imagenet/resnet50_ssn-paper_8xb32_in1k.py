"""ResNet-50 with SSN as the authors trained it, 100 epochs of ImageNet on 8 x 32 images."""

_base_ = './resnet50_ssn_8xb32_in1k.py'
# Candidates IN, LN and BN, and a radius that grows over the whole run.
model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type='SSN', momentum=0.003)))
custom_hooks = [
    dict(type='SSNRadiusHook'),
    _base_.custom_hooks[1],
    _base_.custom_hooks[2],
    _base_.custom_hooks[3],
]
