"""SlowOnly ResNet-50 with GroupNorm, 256 epochs of Kinetics-400 from nothing."""

_base_ = [
    '../_base_/models/slowonly_r50.py',
    '../_base_/datasets/kinetics400.py',
    '../_base_/schedules/kinetics_256e.py',
    '../_base_/action_runtime.py',
]
custom_imports = dict(imports=['ssn_plugin'], allow_failed_imports=False)
model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type='GNNamedBN')))
