"""DeepLabV3+ R50-d8 on ADE20K, SyncBN throughout: the baseline of this folder."""

_base_ = [
    '../_base_/models/deeplabv3plus_r50-d8.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/schedule_80k.py',
    '../_base_/default_runtime.py',
    '../_base_/backbones.py',
]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone={{_base_.bn_r50}},
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
