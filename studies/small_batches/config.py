"""ResNet-18 on a folder of class folders, 64 x 64: the demo's recipe at the size of a study.

run.py sets what differs between runs: norm, width, batch size with its learning rate, epochs, seed.
"""

_base_ = '../../configs/demo/resnet18_ssn_imagefolder.py'

# Decoding a picture takes less than passing it between processes, in batches of 2 for certain.
train_dataloader = dict(num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader

default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
env_cfg = dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
