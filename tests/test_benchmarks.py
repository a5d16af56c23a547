"""The benchmarks: their shapes are those of the configs, and each script runs."""

import csv
import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from ssn_plugin import SSN

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / 'benchmarks'


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the folder, whose scripts import one another by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], '__file__', '')):
            del sys.modules[name]


def inputs_of(model, *runs) -> Counter:
    """How many SSN layers of a model on the meta device meet which input size."""
    seen = {}

    def note(name):
        def hook(module, args):
            seen.setdefault(name, tuple(args[0].shape))

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, SSN)}
    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    for run in runs:
        run(model)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles)
    return Counter(seen.values())


def built(config: str, scope: str):
    cfg = Config.fromfile(ROOT / 'configs' / config)
    cfg.model.backbone.init_cfg = None
    init_default_scope(scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def table(shapes) -> Counter:
    counts = Counter()
    for shape in shapes:
        counts[shape.size] += shape.count
    return counts


def test_detection_shapes_are_those_of_the_config(benchmark):
    pytest.importorskip('mmdet')
    model = built('coco/mask-rcnn_r50_fpn_ssn-all_2x_coco.py', 'mmdet')
    image = torch.empty(2, 3, 800, 1344, device='meta')
    rois = model.train_cfg.rcnn.sampler
    boxes, masks = 2 * rois.num, 2 * int(rois.num * rois.pos_fraction)
    found = inputs_of(
        model,
        lambda model: model.extract_feat(image),
        lambda model: model.roi_head.bbox_head(torch.empty(boxes, 256, 7, 7, device='meta')),
        lambda model: model.roi_head.mask_head(torch.empty(masks, 256, 14, 14, device='meta')),
    )
    assert found == table(benchmark('shapes').MASK_RCNN)


def test_segmentation_shapes_are_those_of_the_config(benchmark):
    pytest.importorskip('mmseg')
    model = built(
        'cityscapes/deeplabv3plus_r50-d8_ssn-all_4xb2-80k_cityscapes-512x1024.py', 'mmseg'
    )

    def run(model):
        features = model.extract_feat(torch.empty(2, 3, 512, 1024, device='meta'))
        model.decode_head(features)
        model.auxiliary_head(features)

    assert inputs_of(model, run) == table(benchmark('shapes').DEEPLAB)


def test_classification_shapes_are_those_of_the_backbone(benchmark):
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(dict(type='SSNResNet', depth=50))
    found = inputs_of(model, lambda model: model(torch.empty(32, 3, 224, 224, device='meta')))
    assert found == table(benchmark('shapes').IMAGENET)
