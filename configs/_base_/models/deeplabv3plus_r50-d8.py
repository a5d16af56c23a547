"""DeepLabV3+ on a plain ResNet-50 with output stride 8, SyncBN throughout."""

_base_ = './deeplabv3_r50-d8.py'
model = dict(
    decode_head=dict(type='DepthwiseSeparableASPPHead', c1_in_channels=256, c1_channels=48)
)
