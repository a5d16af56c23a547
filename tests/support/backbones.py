"""Narrow ResNets of the frameworks, and files in which others keep the same networks."""

import re
from collections import OrderedDict

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn


def build(framework: str, kind: str = 'SSNResNet', **kwargs) -> nn.Module:
    """A narrow backbone, ResNet-18 unless told otherwise, in the scope of a codebase."""
    pytest.importorskip(framework)
    kwargs = dict(depth=18, base_channels=8, stem_channels=8, norm_eval=False) | kwargs
    with DefaultScope.overwrite_default_scope(framework):
        return MODELS.build(dict(type=kind, **kwargs))


def pretrained(path: object, **kwargs) -> dict:
    """An ``init_cfg`` that loads a checkpoint."""
    return dict(type='Pretrained', checkpoint=str(path), **kwargs)


def images(count: int = 2, size: int = 64, seed: int = 5) -> Tensor:
    """Random images."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batch_norm_network(framework: str, seed: int = 1, **kwargs) -> nn.Module:
    """The stock ResNet with BatchNorm of a codebase, with weights of a network that has trained."""
    model = build(framework, 'ResNet', norm_cfg=dict(type='BN'), **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.rand(tensor.shape, generator=generator)
        if tensor.dim() == 4:
            gain = (2 / tensor[0].numel()) ** 0.5
            tensor.copy_(gain * torch.randn(tensor.shape, generator=generator))
        elif name.endswith(('running_mean', 'bias')):
            tensor.copy_(noise - 0.5)
        elif name.endswith('num_batches_tracked'):
            tensor.fill_(1000)
        elif name.endswith('bn3.weight'):
            tensor.copy_(0.4 * noise)  # the last of a block stays small, as after training
        else:
            tensor.copy_(0.5 + noise)
    model.eval()  # gives nothing back
    return model


def as_torchvision(state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Torchvision has the names of mmdet and mmseg, no deep stem, and a classifier fc."""
    return OrderedDict(state) | {'fc.weight': torch.rand(10, 7), 'fc.bias': torch.rand(10)}


def as_timm(state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Timm keeps a deep stem in conv1, but for its last norm, which is bn1."""
    renamed = OrderedDict()
    for key, value in state.items():
        if key.startswith('stem.7.'):
            key = key.replace('stem.7.', 'bn1.')
        elif key.startswith('stem.'):
            key = key.replace('stem.', 'conv1.')
        renamed[key] = value
    return renamed | {'fc.weight': torch.rand(10, 7), 'fc.bias': torch.rand(10)}


def as_conv_modules(state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Mmaction2's ResNet is made of ConvModules, in a recognizer."""
    renamed = OrderedDict()
    for key, value in state.items():
        key = re.sub(r'^(layer\d\.\d+\.)?conv(\d)\.', r'\1conv\2.conv.', key)
        key = re.sub(r'^(layer\d\.\d+\.)?bn(\d)\.', r'\1conv\2.bn.', key)
        key = key.replace('downsample.0.', 'downsample.conv.')
        renamed['backbone.' + key.replace('downsample.1.', 'downsample.bn.')] = value
    return renamed | {'cls_head.fc_cls.weight': torch.rand(10, 7)}


def as_mmpretrain(state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Mmpretrain keeps a deep stem in ConvModules, and has no pool of stride one in shortcuts.

    The backbone stands under 'backbone.' beside a classifier.
    """
    modules = {
        'stem.0.': 'stem.0.conv.',
        'stem.1.': 'stem.0.bn.',
        'stem.3.': 'stem.1.conv.',
        'stem.4.': 'stem.1.bn.',
        'stem.6.': 'stem.2.conv.',
        'stem.7.': 'stem.2.bn.',
        'layer1.0.downsample.1.': 'layer1.0.downsample.0.',
        'layer1.0.downsample.2.': 'layer1.0.downsample.1.',
    }
    if 'layer1.0.downsample.2.weight' not in state:
        modules = {ours: theirs for ours, theirs in modules.items() if 'layer1' not in ours}
    renamed = OrderedDict()
    for key, value in state.items():
        for ours, theirs in modules.items():
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
                break
        renamed[f'backbone.{key}'] = value
    return renamed | {'head.fc.weight': torch.rand(10, 7), 'head.fc.bias': torch.rand(10)}


def as_detector(state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """A detector of mmdet, with BatchNorm in its neck and head too."""
    others = {
        'neck.lateral_convs.0.conv.weight': torch.rand(4, 4, 1, 1),
        'rpn_head.rpn_cls.bias': torch.rand(3),
    }
    norm = nn.BatchNorm2d(4).state_dict()
    others |= {f'neck.fpn_convs.0.bn.{key}': value for key, value in norm.items()}
    others |= {f'roi_head.mask_head.convs.0.bn.{key}': value for key, value in norm.items()}
    return OrderedDict((f'backbone.{key}', value) for key, value in state.items()) | others


def as_segmentor(state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """A segmentor of mmseg, with BatchNorm in its heads."""
    others = {
        'decode_head.conv_seg.weight': torch.rand(2, 4, 1, 1),
        'auxiliary_head.conv_seg.bias': torch.rand(2),
    }
    norm = nn.BatchNorm2d(4).state_dict()
    others |= {f'decode_head.convs.0.bn.{key}': value for key, value in norm.items()}
    return OrderedDict((f'backbone.{key}', value) for key, value in state.items()) | others
