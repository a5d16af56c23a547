"""The demo detector and segmentor, with statistics of data and SSN layers that chose at random."""

import random
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from random_state import randomize_affine_and_running
from torch import Tensor, nn

from ssn_plugin import SSN

DEMO = Path(__file__).parents[2] / 'configs/demo'
CONFIGS = {
    'mmdet': DEMO / 'mask-rcnn_r18_fpn_ssn-all_demo.py',
    'mmseg': DEMO / 'deeplabv3plus_r18-d8_ssn-all_demo.py',
}


def demo_config(scope: str, **norm_cfg) -> Config:
    """The demo config of a codebase; ``norm_cfg`` changes all SSN layers of its model."""
    pytest.importorskip(scope)
    config = Config.fromfile(CONFIGS[scope])
    _update_norms(config.model, norm_cfg)
    return config


def _update_norms(node: object, settings: dict) -> None:
    children = node.values() if isinstance(node, dict) else node
    if isinstance(node, dict) and node.get('type') in ('SSN', 'SyncSSN'):
        if settings.get('type') == 'BN':  # which has no candidates
            node.clear()
        node.update(settings)
    if isinstance(node, dict | list | tuple):
        for child in children:
            _update_norms(child, settings)


def small_segmentor(**norm_cfg) -> Config:
    """That of mmseg with six SSN layers."""
    config = demo_config('mmseg')
    model = config.model
    del model.auxiliary_head
    model.backbone.update(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
    head = model.decode_head
    kept = {key: head[key] for key in ('norm_cfg', 'num_classes', 'loss_decode')}
    model.decode_head = dict(type='FCNHead', in_channels=32, in_index=0, channels=8, **kept)
    model.decode_head.update(num_convs=1, concat_input=False)
    _update_norms(model, norm_cfg)
    return config


def decided_model(config: Config, seed: int = 0) -> nn.Module:
    """The model of a config in evaluation, as a training might leave it.

    Weights and biases of norms are random, running statistics are those of some random images, and
    every layer chose its mean and its variance at random among its candidates.
    """
    torch.manual_seed(seed)
    chosen = random.Random(seed)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    for layer in model.modules():
        if isinstance(layer, SSN):
            with torch.no_grad():
                randomize_affine_and_running(layer)
            layer.select(chosen.choice(layer.normalizers), chosen.choice(layer.normalizers))
    model.train()
    with torch.no_grad():
        for _ in range(3):
            network_outputs(model, torch.randn(4, 3, 96, 128))
    return model.eval()


def network_outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Features of a detector's neck, logits of a segmentor's head."""
    if hasattr(model, 'neck') and hasattr(model, 'roi_head'):
        return model.extract_feat(x)
    return (model(x),)


def relative_difference(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Largest difference, relative to the largest number of its tensor."""
    return max(
        float((a.double() - b.double()).abs().max() / b.abs().max())
        for a, b in zip(ours, theirs, strict=True)
    )
