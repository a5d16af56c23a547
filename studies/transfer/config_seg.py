"""DeepLabV3+ R18 of the demo, fine-tuned from a backbone of the study on small batches.

run.py sets what differs between runs: norm, width, weights, data, batch size with its learning
rate, iterations, seed.
"""

_base_ = '../../configs/demo/deeplabv3plus_r18-d8_ssn-all_demo.py'

train_dataloader = dict(num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
env_cfg = dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
