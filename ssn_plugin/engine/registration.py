"""Registers layers, backbone, hooks and constructor in mmengine's root registries, and prefixes.

The root, because that is where mmcv looks norm layers up from every codebase.
"""

from mmengine.fileio import register_backend
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader

from ssn_plugin.engine.checkpoint_schemes import (
    WarmStartInit,
    load_from_bn2ssn,
    load_from_named_bn,
    load_from_sn2ssn,
)
from ssn_plugin.engine.hooks.checkpoint_hook import SSNCheckpointHook
from ssn_plugin.engine.hooks.precise_stats_hook import PreciseStatsHook
from ssn_plugin.engine.hooks.radius_hook import SSNRadiusHook
from ssn_plugin.engine.hooks.ratio_hook import SSNRatioHook
from ssn_plugin.engine.hooks.resume_hook import SSNResumeHook
from ssn_plugin.engine.hooks.start_hook import SSNStartHook
from ssn_plugin.engine.optim_wrapper_constructor import SSNOptimWrapperConstructor
from ssn_plugin.engine.whole_file_backend import WholeFileBackend
from ssn_plugin.layers.ssn import SSN, SSN1d, SSN2d, SSN3d
from ssn_plugin.layers.switch_norm import SN
from ssn_plugin.layers.sync_ssn import SyncSSN
from ssn_plugin.models.collapsed_model import NAME as COLLAPSED
from ssn_plugin.models.collapsed_model import build_collapsed_ssn
from ssn_plugin.models.converted_model import NAME as CONVERTED
from ssn_plugin.models.converted_model import build_converted_ssn
from ssn_plugin.models.dropout_head import build_dropout_linear_cls_head
from ssn_plugin.models.named_bn import GNNamedBN, SNNamedBN, SSNNamedBN, SyncSSNNamedBN
from ssn_plugin.models.resnet import build_ssn_resnet

for _layer in (SSN, SSN1d, SSN2d, SSN3d, SyncSSN, SN):
    MODELS.register_module(name=_layer.__name__, module=_layer)
for _named in (SSNNamedBN, SyncSSNNamedBN, SNNamedBN, GNNamedBN):
    MODELS.register_module(module=_named)
MODELS.register_module(name='SSNResNet', module=build_ssn_resnet)
MODELS.register_module(name='DropoutLinearClsHead', module=build_dropout_linear_cls_head)
MODELS.register_module(name=COLLAPSED, module=build_collapsed_ssn)
MODELS.register_module(name=CONVERTED, module=build_converted_ssn)
for _hook in (
    SSNStartHook,
    SSNRadiusHook,
    SSNRatioHook,
    SSNResumeHook,
    SSNCheckpointHook,
    PreciseStatsHook,
):
    HOOKS.register_module(module=_hook)
OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=SSNOptimWrapperConstructor)
CheckpointLoader.register_scheme('bn2ssn://', load_from_bn2ssn)
CheckpointLoader.register_scheme('sn2ssn://', load_from_sn2ssn)
CheckpointLoader.register_scheme('named_bn://', load_from_named_bn)
# 'Pretrained' stays mmengine's for all but the two prefixes above.
WEIGHT_INITIALIZERS.register_module(name='Pretrained', module=WarmStartInit, force=True)
register_backend('whole_file', WholeFileBackend)
