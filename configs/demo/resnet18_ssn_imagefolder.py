"""ResNet-18 with SSN on any folder of class folders, images of 64 x 64, on a CPU.

SSN_IMAGEFOLDER names the folder, data/imagefolder unless set; it holds train/CLASS/* and
val/CLASS/*.
"""

os = __import__('os')  # an import makes it a config of the other style to mmengine 0.10.7

_base_ = [
    '../_base_/models/resnet18_cls.py',
    '../_base_/classification_runtime.py',
    '../_base_/ssn_training.py',
]

data_root = '{{$SSN_IMAGEFOLDER:data/imagefolder}}'
num_classes = len(next(os.walk(os.path.join(data_root, 'train')), ('', [], []))[1])
size = 64
max_epochs = 20

model = dict(
    backbone=dict(norm_cfg=dict(_base_.ssn_norm, _delete_=True)),
    head=dict(num_classes=num_classes, dropout=0.2, topk=(1,)),
)
data_preprocessor = dict(
    num_classes=num_classes,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=size, crop_ratio_range=(0.3, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4, backend='cv2'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(size, size)),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    # A last batch of one image would leave BN a map of 2 x 2 to learn from.
    drop_last=True,
    dataset=dict(
        type='CustomDataset', data_root=data_root, data_prefix='train', pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset', data_root=data_root, data_prefix='val', pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

optimizer = dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4)
optim_wrapper = dict(type='OptimWrapper', optimizer=optimizer, **_base_.ssn_optim_wrapper)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=1, convert_to_iter_based=True
    ),
    dict(
        type='CosineAnnealingLR', by_epoch=True, begin=1, end=max_epochs, convert_to_iter_based=True
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=10),
    checkpoint=dict(type='SSNCheckpointHook', interval=1, max_keep_ckpts=2),
)
randomness = dict(seed=0)
env_cfg = dict(cudnn_benchmark=False)
