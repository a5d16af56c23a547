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


def test_figures_of_the_readme_are_those_of_the_page_of_results():
    _, _, status = (ROOT / 'README.md').read_text().partition('## Status\n')
    status, _, _ = status.partition('\n## ')
    figures = set(re.findall(r'(?<![\w.])(\d+\.\d+|\d+(?= %| x ))', status))
    assert len(figures) > 10
    known = set(re.findall(r'\d+(?:\.\d+)?', (ROOT / 'docs' / 'results.md').read_text()))
    assert figures <= known


def test_make_targets_that_are_named_exist():
    named = set()
    for page in PAGES:
        named |= set(re.findall(r'(?:^|`)make ([a-z-]+)', page.read_text(), re.MULTILINE))
    known = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    assert named
    assert named <= known


def test_config_of_the_readme_builds(tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    (neck,) = (block for block in blocks if block.startswith('_base_'))
    backbone = next(block for block in blocks if 'SSNResNet' in block)
    head = neck.replace('PATH/TO/configs', str(ROOT / 'configs'))
    both = tmp_path / 'both.py'
    both.write_text(head + backbone.replace('model = ', 'added = '))
    config = Config.fromfile(str(both))
    config.merge_from_dict({'model': config.added})
    config.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    from mmdet.registry import MODELS

    model = MODELS.build(config.model)
    layers = [name for name, module in model.named_modules() if isinstance(module, SSN)]
    assert sum(name.startswith('backbone.') for name in layers) == 53
    assert sum(name.startswith('neck.') for name in layers) == 8
    assert config.optim_wrapper.constructor == 'SSNOptimWrapperConstructor'
    assert [hook.type for hook in config.custom_hooks] == [
        'SSNRadiusHook',
        'SSNRatioHook',
        'SSNResumeHook',
    ]
    assert config.default_hooks.checkpoint.type == 'SSNCheckpointHook'
