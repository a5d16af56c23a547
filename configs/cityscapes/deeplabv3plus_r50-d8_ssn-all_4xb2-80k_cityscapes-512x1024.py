"""DeepLabV3+ R50-d8 on Cityscapes, SSN with synchronised statistics throughout."""

_base_ = [
    './deeplabv3plus_r50-d8_syncbn_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/ssn_training.py',
]
norm_cfg = dict(_base_.ssn_norm, type='SyncSSN')
model = dict(
    backbone={{_base_.sync_ssn_r50}},
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)
optim_wrapper = {{_base_.ssn_optim_wrapper}}
default_hooks = {{_base_.ssn_default_hooks}}
