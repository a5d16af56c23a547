"""What README.md and the other pages say holds: links, and the configs they show."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

from ssn_plugin import SSN

ROOT = Path(__file__).parents[1]
PAGES = sorted((*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('configs/**/*.md')))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)#]+)', page.read_text())
    missing = [
        link for link in links if '://' not in link and not (page.parent / link).resolve().exists()
    ]
    assert not missing


def test_the_readme_is_short():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 700


def test_figures_of_the_readme_are_those_of_the_page_of_results():
    _, _, table = (ROOT / 'README.md').read_text().partition('## When to use it\n')
    table, _, _ = table.partition('\n## ')
    figures = set(re.findall(r'\d+\.\d+', table))
    assert len(figures) > 5
    known = set(re.findall(r'\d+\.\d+', (ROOT / 'docs' / 'results.md').read_text()))
    assert figures <= known


def test_make_targets_that_are_named_exist():
    named = set()
    for page in PAGES:
        named |= set(re.findall(r'(?:^|`)make ([a-z-]+)', page.read_text(), re.MULTILINE))
    known = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    assert named
    assert named <= known


@pytest.mark.parametrize('index', [0, 1])
def test_configs_of_the_readme_build(tmp_path, index):
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    path = tmp_path / 'shown.py'
    path.write_text(blocks[index].replace("'configs/", f"'{ROOT}/configs/"))
    config = Config.fromfile(str(path))
    assert config.model.backbone.init_cfg.type == 'Pretrained'
    config.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    from mmdet.registry import MODELS

    model = MODELS.build(config.model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SSN)}
    assert sum(name.startswith('backbone.') for name in layers) == 53
    assert sum(name.startswith('neck.') for name in layers) == 8
    released = (1, ('IN', 'LN', 'BN')), (0, ('LN', 'GN', 'BN'))
    first = layers['backbone.sn1']
    assert (first.correction, first.normalizers) == released[index]
    assert config.optim_wrapper.constructor == 'SSNOptimWrapperConstructor'
    assert [hook.type for hook in config.custom_hooks] == [
        'SSNRadiusHook',
        'SSNRatioHook',
        'SSNResumeHook',
        'SSNStartHook',
    ]
    assert config.default_hooks.checkpoint.type == 'SSNCheckpointHook'
