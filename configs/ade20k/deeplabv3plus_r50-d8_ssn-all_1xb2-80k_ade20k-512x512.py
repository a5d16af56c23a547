"""DeepLabV3+ R50-d8 on ADE20K, SSN throughout, on one GPU."""

_base_ = './deeplabv3plus_r50-d8_ssn-all_4xb4-80k_ade20k-512x512.py'
# So few images are too small a batch for BN: the layers of the backbone that chose it keep the
# statistics of the pre-training.
model = dict(backbone=dict(norm_eval=True))
train_dataloader = dict(batch_size=2)
# 2 crops: an eighth of the learning rate for 16.
optim_wrapper = dict(optimizer=dict(lr=0.00125))
