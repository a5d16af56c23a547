"""ResNet-50 with an embedding of 512 numbers and ArcFace; the faces configs change the norm."""

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SSNResNet',
        depth=50,
        norm_cfg=dict(type='BN', requires_grad=True),
        zero_init_residual=True,
    ),
    neck=dict(
        type='LinearNeck',
        in_channels=2048,
        out_channels=512,
        gap_dim=2,
        norm_cfg=dict(type='BN1d'),
    ),
    head=dict(type='ArcFaceClsHead', num_classes=0, in_channels=512, scale=64.0, margins=0.5),
)
