"""ResNet-50 backbones that differ in nothing but the norm and the weights made with it."""

_base_ = './pretrained.py'

bn_r50 = dict(init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.bn_r50}}))

gn_r50 = dict(
    norm_cfg=dict(type='GN', num_groups=32),
    norm_eval=False,
    init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.gn_r50}}),
)

# SN keeps the BN part of its statistics live and per GPU (norm_eval=False), as its authors do.
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
    # Layers without released weights (FPN, heads) take `ssn_norm` of ssn_training.py.
    norm_cfg=dict(type='SSN', correction=1, momentum=0.003),
    # These layers are decided, and 2 images per GPU are too small a batch for those that chose BN,
    # as mmdet has it for BatchNorm: they keep the statistics of the pre-training. Layers that have
    # yet to choose (`bn2ssn://`) need norm_eval=False.
    norm_eval=True,
    init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained.ssn_r50}}),
)

# For segmentation, where SyncBN is the custom: live statistics, over the images of all GPUs.
sync_ssn_r50 = dict(ssn_r50, norm_cfg=dict(ssn_r50['norm_cfg'], type='SyncSSN'), norm_eval=False)
