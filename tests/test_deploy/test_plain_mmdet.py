"""What docs/plain-mmdet.md does to weights gives the stock networks what SSN computed."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope, init_default_scope

from ssn_plugin import SSN, collapse_ssn, set_radius

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _mmdet(monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())
    init_default_scope('mmdet')


def network(backbone: dict, norm: dict) -> torch.nn.Module:
    """A backbone and an FPN, as parts of a model are named."""
    import mmdet.models  # noqa: F401  (registers)

    model = torch.nn.Module()
    parts = dict(depth=18, base_channels=8, norm_cfg=norm, norm_eval=False)
    model.backbone = MODELS.build(dict(**backbone, **parts))
    fpn = dict(in_channels=[8, 16, 32, 64], out_channels=8, num_outs=4, norm_cfg=norm)
    model.neck = MODELS.build(dict(type='FPN', **fpn))
    return model.eval()


def test_weights_of_a_model_that_chose_bn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'work_dirs/run').mkdir(parents=True)
    model = network(dict(type='SSNResNet', stem_padding=1), dict(type='SSN'))
    set_radius(model, 1.0)  # equal control parameters end at the last candidate
    for layer in (m for m in model.modules() if isinstance(m, SSN)):
        assert layer.selected == ('BN', 'BN')
        torch.nn.init.uniform_(layer.running_mean, -1, 1)
        torch.nn.init.uniform_(layer.running_var, 0.5, 2)
        torch.nn.init.uniform_(layer.weight, 0.5, 2)
        torch.nn.init.uniform_(layer.bias, -1, 1)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model.neck(model.backbone(x))
    torch.save({'state_dict': collapse_ssn(model).state_dict()}, 'work_dirs/run/collapsed.pth')

    page = (ROOT / 'docs/plain-mmdet.md').read_text()
    (code,) = re.findall(r'^```python\n(.*?)^```', page, re.DOTALL | re.MULTILINE)
    exec(code, {})

    plain = network(dict(type='ResNet'), dict(type='BN'))
    state = torch.load('work_dirs/run/plain.pth', weights_only=True)['state_dict']
    plain.load_state_dict(state)  # strictly
    with torch.no_grad():
        found = plain.neck(plain.backbone(x))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
