"""ResNet-50 with SSN, also after the embedding, and ArcFace on a folder of identities."""

_base_ = [
    '../_base_/models/resnet50_arcface.py',
    '../_base_/datasets/faces.py',
    '../_base_/schedules/faces_20e.py',
    '../_base_/classification_runtime.py',
    '../_base_/ssn_training.py',
]
model = dict(
    backbone=dict(norm_cfg=dict(_base_.ssn_norm, _delete_=True)),
    neck=dict(norm_cfg=dict(_base_.ssn_norm, _delete_=True, type='SSN1d')),
    head=dict(num_classes={{_base_.num_classes}}),
)
optim_wrapper = {{_base_.ssn_optim_wrapper}}
default_hooks = {{_base_.ssn_default_hooks}}
