"""A small DeepLabV3+ with SSN throughout, from scratch on the demo scenes, in minutes on a CPU."""

_base_ = [
    '../_base_/models/deeplabv3plus_r50-d8.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/demo.py',
    '../_base_/ssn_training.py',
]

# Of the 32 channels of the first stage, 32 groups would make IN.
norm_cfg = dict(_base_.ssn_norm, num_groups=8)
num_classes = 5
crop_size = (96, 128)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type='SSNResNet',
        depth=18,
        base_channels=32,
        stem_channels=32,
        norm_cfg=dict(_delete_=True, **norm_cfg),
    ),
    decode_head=dict(
        in_channels=256,
        channels=64,
        # Half of the usual rates: the map of a demo scene is 16 x 20.
        dilations=(1, 3, 6, 9),
        c1_in_channels=32,
        c1_channels=16,
        num_classes=num_classes,
        norm_cfg=dict(_delete_=True, **norm_cfg),
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=32,
        num_classes=num_classes,
        norm_cfg=dict(_delete_=True, **norm_cfg),
    ),
)

metainfo = dict(
    classes=('background', 'coin', 'cup', 'horse', 'motorcycle'),
    palette=[(60, 60, 60), (255, 205, 40), (230, 60, 50), (60, 200, 110), (70, 120, 255)],
)
# CityscapesDataset, whose layout this is, takes its own 19 class names and no others.
dataset_type = 'BaseSegDataset'
suffixes = dict(img_suffix='_leftImg8bit.png', seg_map_suffix='_gtFine_labelTrainIds.png')
data_root = 'data/demo/cityscapes/'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    # A no-op at the size of the demo scenes; inference on other pictures needs the scale.
    dict(type='Resize', scale=(160, 128), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        **suffixes,
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        **suffixes,
        data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = {{_base_.ssn_optim_wrapper}}
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='SSNCheckpointHook', by_epoch=False, interval=400, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
log_processor = dict(by_epoch=False, window_size=20)
