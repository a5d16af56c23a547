"""ResNet-50 backbones that differ in nothing but the norm and the weights made with it."""

_base_ = './pretrained.py'

bn_r50 = dict(init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.bn_r50}}))

gn_r50 = dict(
    norm_cfg=dict(type='GN', num_groups=32),
    norm_eval=False,
    init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.gn_r50}}),
)

# SN and SSN keep the BN part of their statistics live and per GPU (norm_eval=False), as the authors
# of SN fine-tune; mmdet's norm_eval=True is for BatchNorm alone, whose batch of 2 is too small.
sn_r50 = dict(
    type='SSNResNet',
    norm_cfg=dict(type='SN'),
    norm_eval=False,
    init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.sn_r50}}),
)

ssn_r50 = dict(
    type='SSNResNet',
    # The released weights were trained with unbiased variances (correction=1), running variance
    # included, and a running average that moves by 0.003 a step: fine-tuning goes on the same way.
    # Layers without released weights (FPN, heads) take the defaults of `dict(type="SSN")`.
    norm_cfg=dict(type='SSN', correction=1, momentum=0.003),
    norm_eval=False,
    init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.ssn_r50}}),
)

# For segmentation, where SyncBN is the custom.
sync_ssn_r50 = dict(ssn_r50, norm_cfg=dict(ssn_r50['norm_cfg'], type='SyncSSN'))
