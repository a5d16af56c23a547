"""The summary of a config says what the config says."""

import re

import pytest

from ssn_plugin.analysis.config_summary import summarise
from ssn_plugin.engine.hooks.radius_hook import SSNRadiusHook
from ssn_plugin.jobs.configs import load_config


def facts(path: str, max_iters: int | None = None) -> dict[str, dict[str, str]]:
    return {s.heading: dict(s.facts) for s in summarise(load_config(path), max_iters)}


def test_the_demo_detector():
    pytest.importorskip('mmdet')
    found = facts('configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py', 800)
    assert found['Model']['type'] == 'MaskRCNN'
    assert found['Model']['backbone'].startswith('SSNResNet, depth 18')
    assert found['Model']['roi_head.mask_head'] == 'FCNMaskHead'
    (norms,) = found['Normalisation']
    assert norms == 'backbone, neck, roi_head.bbox_head, roi_head.mask_head'
    assert found['Normalisation'][norms].startswith('SSN, normalizers LN, GN, BN')
    assert found['Data']['train: images per process'] == '4'
    assert found['Data']['val: data'].endswith('data/demo/coco/annotations/instances_val2017.json')
    assert 'SGD, lr 0.02' in found['Optimisation']['optimizer']
    assert found['Schedule']['radius'] == '0 to 1, from 0 to 0.3 of the run'
    first = int(re.search(r'iteration (\d+) of 800', str(found['Schedule']))[1])
    hook = SSNRadiusHook(end=0.3)
    assert hook.radius_at(first - 1, 800) >= (2 / 3) ** 0.5 > hook.radius_at(first - 2, 800)


@pytest.mark.parametrize(
    'path',
    [
        'configs/cityscapes/deeplabv3plus_r50-d8_ssn-all_4xb2-80k_cityscapes-512x1024.py',
        'configs/coco/mask-rcnn_r50_fpn_bn-all_2x_coco.py',
        'configs/imagenet/resnet50_ssn_8xb32_in1k.py',
    ],
)
def test_other_configs(path):
    if 'coco' in path:
        pytest.importorskip('mmdet')
    found = facts(path)
    assert set(found) == {'Model', 'Normalisation', 'Data', 'Optimisation', 'Schedule'}
    assert any('SSN' in norm or 'BN' in norm for norm in found['Normalisation'].values())
    assert 'all layers of three candidates decided' not in found['Schedule']


def test_a_config_with_nothing(tmp_path):
    (tmp_path / 'empty.py').write_text('a = 1\n')
    assert summarise(load_config(str(tmp_path / 'empty.py'))) == []


def test_weights_wherever_a_config_names_them(tmp_path):
    (tmp_path / 'config.py').write_text(
        "one = dict(type='Pretrained', checkpoint='a.pth')\n"
        "model = dict(type='Net', pretrained='b.pth',\n"
        "    backbone=dict(type='SSNResNet', init_cfg=one),\n"
        "    neck=dict(init_cfg=[dict(type='Xavier'), dict(one, checkpoint='c.pth')]),\n"
        "    heads=[dict(type='Head', init_cfg=dict(one, checkpoint='d.pth'))])\n"
    )
    found = facts(str(tmp_path / 'config.py'))['Model']
    assert {key: name for key, name in found.items() if key.startswith('weights')} == {
        'weights of model': 'b.pth',
        'weights of model.backbone': 'a.pth',
        'weights of model.neck': 'c.pth',
        'weights of model.heads.0': 'd.pth',
    }
