"""SlowOnly ResNet-50 with SSN, 256 epochs of Kinetics-400 from nothing."""

_base_ = [
    '../_base_/models/slowonly_r50.py',
    '../_base_/datasets/kinetics400.py',
    '../_base_/schedules/kinetics_256e.py',
    '../_base_/action_runtime.py',
    '../_base_/ssn_training.py',
]
model = dict(backbone=dict(norm_cfg=dict(_base_.ssn_norm, _delete_=True, type='SSNNamedBN')))
optim_wrapper = {{_base_.ssn_optim_wrapper}}
default_hooks = {{_base_.ssn_default_hooks}}
# As in ssn_training.py, with fewer records: a run has 480k iterations.
custom_hooks = [
    _base_.custom_hooks[0],
    dict(type='SSNRatioHook', interval=100),
    _base_.custom_hooks[2],
    _base_.custom_hooks[3],
]
