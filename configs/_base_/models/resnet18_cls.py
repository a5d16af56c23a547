"""ResNet-18 classifier; the ImageNet configs change depth and norm and nothing else.

`SSNResNet` for every norm, so that the networks that are compared have the same stem pool.
"""

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SSNResNet',
        depth=18,
        norm_cfg=dict(type='BN', requires_grad=True),
        zero_init_residual=True,  # gamma = 0 in the last norm of each block
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='DropoutLinearClsHead',
        num_classes=1000,
        in_channels=512,
        dropout=0.5,
        topk=(1, 5),
    ),
)
