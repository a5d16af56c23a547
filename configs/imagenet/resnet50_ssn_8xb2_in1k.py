"""ResNet-50 with SSN, 100 epochs of ImageNet on 8 x 2 images."""

_base_ = './resnet50_ssn_8xb32_in1k.py'
train_dataloader = dict(batch_size=2)
# Linear scaling: 0.1 x 16 / 256.
optim_wrapper = dict(optimizer=dict(lr=0.00625))
auto_scale_lr = dict(base_batch_size=16)
