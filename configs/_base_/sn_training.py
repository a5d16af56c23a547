"""The training rules of SN, SSN's softmax parent: no weight decay on its control parameters."""

custom_imports = dict(imports=['ssn_plugin'], allow_failed_imports=False)

sn_optim_wrapper = dict(
    constructor='SSNOptimWrapperConstructor',
    paramwise_cfg=dict(ssn_lr_mult=1.0, ssn_decay_mult=0.0, ssn_clip_norm=None),
)
