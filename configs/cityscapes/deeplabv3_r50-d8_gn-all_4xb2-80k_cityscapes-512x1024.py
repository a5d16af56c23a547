"""DeepLabV3 R50-d8 on Cityscapes, GroupNorm throughout."""

_base_ = './deeplabv3_r50-d8_syncbn_4xb2-80k_cityscapes-512x1024.py'
norm_cfg = dict(type='GN', num_groups=32)
model = dict(
    backbone={{_base_.gn_r50}},
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)
