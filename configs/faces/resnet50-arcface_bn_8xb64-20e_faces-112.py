"""ResNet-50 with BatchNorm, also after the embedding, and ArcFace on a folder of identities."""

_base_ = [
    '../_base_/models/resnet50_arcface.py',
    '../_base_/datasets/faces.py',
    '../_base_/schedules/faces_20e.py',
    '../_base_/classification_runtime.py',
]
custom_imports = dict(imports=['ssn_plugin'], allow_failed_imports=False)
model = dict(head=dict(num_classes={{_base_.num_classes}}))
