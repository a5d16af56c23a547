"""The rules of SSN: candidates, radius schedule, ratio log, control parameters, safe interruption.

Add this file to `_base_` of any mmdet or mmseg config, then write `norm_cfg=_base_.ssn_norm`,
`optim_wrapper = {{_base_.ssn_optim_wrapper}}` and `default_hooks = {{_base_.ssn_default_hooks}}`
there: the last two merge into the optimizer wrapper and the hooks of the other bases. Two bases may
not define the same name, so this file cannot set them itself.
"""

custom_imports = dict(imports=['ssn_plugin'], allow_failed_imports=False)

# The norm of every layer that has yet to choose. studies/defaults compares it with other rules;
# `dict(type='SSN')` has the candidates of the paper and of the released files, (IN, LN, BN).
ssn_norm = dict(type='SSN', normalizers=('LN', 'GN', 'BN'))

custom_hooks = [
    # Linear from 0 to 1 over the first 30 % of the run. A layer of three candidates is one-hot at
    # the latest when the radius passes sqrt(2/3), after 24.5 % of the training: a mixture trains
    # more slowly than the normalizer that it becomes. The paper's radius grows over the whole run.
    # Where BN has fewer than 16 values per channel (after a global pooling, on the last maps of
    # small images) a layer does not get it to choose from: its statistics are noise there.
    dict(
        type='SSNRadiusHook',
        begin=0.0,
        end=0.3,
        start_radius=0.0,
        end_radius=1.0,
        min_values=16,
    ),
    dict(type='SSNRatioHook'),
    # A run that is killed and resumed goes on with the random numbers of one that is not.
    dict(type='SSNResumeHook'),
    # Says before the first step which norms there are, and what would keep them from deciding.
    dict(type='SSNStartHook'),
]
# No kill and no full disk breaks the only checkpoint.
ssn_default_hooks = dict(checkpoint=dict(type='SSNCheckpointHook'))

ssn_optim_wrapper = dict(
    constructor='SSNOptimWrapperConstructor',
    paramwise_cfg=dict(ssn_lr_mult=0.1, ssn_decay_mult=0.0, ssn_clip_norm=1.0),
)
