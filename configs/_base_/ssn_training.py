"""The training rules of SSN: radius schedule, ratio log, control parameters, safe interruption.

Add this file to `_base_` of any mmdet or mmseg config, then write
`optim_wrapper = {{_base_.ssn_optim_wrapper}}` and `default_hooks = {{_base_.ssn_default_hooks}}`
there: they merge into the optimizer wrapper and the hooks of the other bases. Two bases may not
define the same name, so this file cannot set them itself.
"""

custom_imports = dict(imports=['ssn_plugin'], allow_failed_imports=False)

custom_hooks = [
    # Linear from 0 to 1 over the whole run. A layer is one-hot at the latest when the radius passes
    # sqrt(2/3), which is after 81.65 % of the training.
    dict(type='SSNRadiusHook', begin=0.0, end=1.0, start_radius=0.0, end_radius=1.0),
    dict(type='SSNRatioHook'),
    # A run that is killed and resumed goes on with the random numbers of one that is not.
    dict(type='SSNResumeHook'),
]
# No kill and no full disk breaks the only checkpoint.
ssn_default_hooks = dict(checkpoint=dict(type='SSNCheckpointHook'))

ssn_optim_wrapper = dict(
    constructor='SSNOptimWrapperConstructor',
    paramwise_cfg=dict(ssn_lr_mult=0.1, ssn_decay_mult=0.0, ssn_clip_norm=1.0),
)
