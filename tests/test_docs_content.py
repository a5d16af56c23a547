"""What the pages show is real: examples run, configs load and build, and every name exists."""

import ast
import doctest
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine import registry
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope, init_default_scope

import ssn_plugin
from ssn_plugin.layers.switchable import SwitchableNorm
from ssn_plugin.torch_versions import EXPORTS_EVERY_SIZE

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    (
        ROOT / 'README.md',
        ROOT / 'CONTRIBUTING.md',
        *ROOT.glob('docs/**/*.md'),
        *ROOT.glob('configs/**/*.md'),
    )
)
REGISTRIES = ('MODELS', 'HOOKS', 'OPTIM_WRAPPER_CONSTRUCTORS')


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize('page', PAGES, ids=page_name)


@pytest.fixture(autouse=True)
def _leave_no_default_scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE)


def in_backticks(page: Path) -> list[str]:
    prose = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r'`([^`]+)`', prose)


@every_page
def test_examples_run(page):
    # Blocks of one page share their names, as they do for a reader.
    text = '\n'.join(blocks(page, 'pycon'))
    if 'torch.export' in text and not EXPORTS_EVERY_SIZE:
        pytest.skip('torch.export for every size: torch 2.6 or newer')
    example = doctest.DocTestParser().get_doctest(text, {}, page_name(page), str(page), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report = []
    torch.manual_seed(0)
    assert runner.run(example, out=report.append).failed == 0, ''.join(report)


def as_config(text: str, folder: Path) -> Config:
    """What a config says, its ``_base_`` looked for where the page is read from."""
    text = text.replace('PATH/TO/configs', str(ROOT / 'configs'))
    for written, meant in (('../_base_', 'configs/_base_'), ('configs', 'configs')):
        text = text.replace(f"'{written}/", f"'{ROOT / meant}/")
    path = folder / 'shown.py'
    path.write_text(text)
    return Config.fromfile(str(path))


def is_config(text: str) -> bool:
    """Whether a block only assigns, as configs do."""
    braces = re.sub(r'\{\{.*?\}\}', 'None', text)
    nodes = ast.parse(braces).body
    return all(isinstance(node, ast.Assign) for node in nodes)


@every_page
def test_python_compiles_and_configs_load(page, tmp_path):
    for text in blocks(page, 'python'):
        braces = re.sub(r'\{\{.*?\}\}', 'None', text)
        compile(braces, page_name(page), 'exec')
        if is_config(text):
            as_config(text, tmp_path)


def built(config: Config) -> torch.nn.Module:
    config.model.backbone.init_cfg = None
    init_default_scope(config.default_scope)
    return registry.MODELS.build(config.model)


def switchable_in(model: torch.nn.Module) -> set[str]:
    """The parts of a model that hold SSN layers."""
    return {
        name.split('.')[0]
        for name, module in model.named_modules()
        if isinstance(module, SwitchableNorm)
    }


def test_config_for_your_data_builds(tmp_path):
    (text,) = (t for t in blocks(ROOT / 'docs' / 'your-data.md', 'python') if '_base_' in t)
    config = as_config(text, tmp_path)
    model = built(config)
    assert switchable_in(model) == {'backbone', 'neck', 'roi_head'}
    assert model.roi_head.bbox_head.num_classes == model.roi_head.mask_head.num_classes == 4
    assert model.backbone.frozen_stages == -1
    assert config.optim_wrapper.optimizer.lr == 0.0025
    for split in ('train', 'val', 'test'):
        dataset = config[f'{split}_dataloader'].dataset
        assert dataset.data_root == 'data/mine/coco/'
        assert dataset.metainfo.classes[0] == 'coin'
    assert config.test_evaluator.ann_file.startswith('data/mine/coco/annotations/')


def test_data_of_that_page_is_what_it_says(tmp_path):
    pytest.importorskip('skimage')
    from demo_data import make_demo_dataset

    (text,) = (t for t in blocks(ROOT / 'docs' / 'your-data.md', 'python') if '_base_' in t)
    config = as_config(text, tmp_path)
    make_demo_dataset(tmp_path / 'mine', num_train=2, num_val=2, size=96)
    init_default_scope('mmdet')
    from mmdet.registry import DATASETS

    for split in ('train', 'val'):
        dataset = config[f'{split}_dataloader'].dataset
        dataset.data_root = str(tmp_path / 'mine' / 'coco')
        dataset.filter_cfg = None
        assert len(DATASETS.build(dataset)) == 2
    count = next(t for t in blocks(ROOT / 'docs' / 'your-data.md', 'python') if 'import json' in t)
    exec(count.replace('data/mine', str(tmp_path / 'mine')), {})


def page_config(page: str, folder: Path) -> Config:
    """The config that a page has the reader write."""
    (text,) = (t for t in blocks(ROOT / 'docs' / f'{page}.md', 'python') if '_base_' in t)
    return as_config(text, folder)


def test_config_for_your_segmentation_data_builds(tmp_path):
    config = page_config('your-seg-data', tmp_path)
    model = built(config)
    assert switchable_in(model) == {'backbone', 'decode_head', 'auxiliary_head'}
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 5
    assert config.optim_wrapper.constructor == 'SSNOptimWrapperConstructor'
    assert config.optim_wrapper.optimizer.lr == 0.0025
    assert config.default_hooks.checkpoint.type == 'SSNCheckpointHook'
    assert config.default_hooks.logger.type == 'LoggerHook'


@pytest.mark.parametrize('norm', ['BN', 'GN', 'SSN'])
@pytest.mark.parametrize('page', ['your-data', 'your-seg-data'])
def test_configs_that_compare_norms(page, norm, tmp_path, monkeypatch):
    monkeypatch.setenv('NORM', norm)
    base = {'your-data': 'my_config.py', 'your-seg-data': 'my_seg_config.py'}[page]
    page_config(page, tmp_path)
    (tmp_path / 'shown.py').rename(tmp_path / base)
    (text,) = (t for t in blocks(ROOT / 'docs' / 'does-it-help.md', 'python') if f"'{base}'" in t)
    config = as_config(text, tmp_path)
    model = built(config)
    kinds = {'BN': torch.nn.BatchNorm2d, 'GN': torch.nn.GroupNorm, 'SSN': SwitchableNorm}
    norms = {
        kind: [name for name, module in model.named_modules() if isinstance(module, cls)]
        for kind, cls in kinds.items()
    }
    assert {kind for kind, names in norms.items() if names} == {'BN', norm}
    backbone = [name for name in norms['BN'] if name.startswith('backbone.')]
    assert len(backbone) == 53
    assert any(not name.startswith('backbone.') for name in norms[norm])
    assert ('SSNRadiusHook' in {hook.type for hook in config.custom_hooks}) == (norm == 'SSN')


def sides(diff: str) -> tuple[str, str]:
    """What a diff starts from, and what it ends with."""
    return tuple(
        '\n'.join(line[1:] for line in diff.splitlines() if line[:1] in f' {sign}') for sign in '-+'
    )


def test_converted_detector_builds(tmp_path):
    before, after = sides(blocks(ROOT / 'docs' / 'convert.md', 'diff')[0])
    stock = as_config(before, tmp_path)
    assert stock.model.backbone.norm_cfg.type == 'BN'
    assert not switchable_in(built(stock))
    config = as_config(after, tmp_path)
    model = built(config)
    assert switchable_in(model) == {'backbone', 'neck', 'roi_head'}
    assert type(model.backbone).__name__ == 'SSNResNet'
    assert not model.backbone.norm_eval
    assert config.optim_wrapper.constructor == 'SSNOptimWrapperConstructor'
    assert config.optim_wrapper.optimizer.lr == stock.optim_wrapper.optimizer.lr == 0.02


def test_converted_segmenter_builds(tmp_path):
    before, after = sides(blocks(ROOT / 'docs' / 'convert.md', 'diff')[1])
    assert not switchable_in(built(as_config(before, tmp_path)))
    config = as_config(after, tmp_path)
    model = built(config)
    assert switchable_in(model) == {'backbone', 'decode_head', 'auxiliary_head'}
    assert model.backbone.init_cfg['checkpoint'] == 'bn2ssn://open-mmlab://resnet50_v1c'
    norms = [m for m in model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert not norms
    assert config.optim_wrapper.constructor == 'SSNOptimWrapperConstructor'


@pytest.mark.parametrize(
    ('base', 'parts', 'hooks'),
    [('cascade', {'neck', 'roi_head'}, 4), ('rtmdet', {'backbone', 'neck', 'bbox_head'}, 6)],
)
def test_lists_of_heads_and_of_hooks(base, parts, hooks, tmp_path):
    (text,) = (t for t in blocks(ROOT / 'docs' / 'convert.md', 'python') if f'::{base}' in t)
    config = as_config(text, tmp_path)
    model = built(config)
    assert switchable_in(model) == parts
    assert len(config.custom_hooks) == hooks
    if base == 'cascade':
        heads = [type(head).__name__ for head in model.roi_head.bbox_head]
        assert heads == ['Shared4Conv1FCBBoxHead'] * 3
        coders = [head.bbox_coder.stds[0] for head in model.roi_head.bbox_head]
        assert coders == [0.1, 0.05, 0.033]
    build_optim_wrapper(model, config.optim_wrapper)


def dict_calls(text: str) -> Iterator[dict]:
    """Every ``dict(type='SSN...', ...)`` of literals in a piece of code."""
    try:
        tree = ast.parse(re.sub(r'\{\{.*?\}\}', 'None', text))
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == 'dict'
        ):
            try:
                yield {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            except ValueError:
                continue


def test_what_configs_name_can_be_built():
    names = {'SSN', 'SN', 'SyncSSN', 'SSNRadiusHook', 'SSNRatioHook'}
    seen = set()
    for page in PAGES:
        for text in [*blocks(page, 'python'), *in_backticks(page)]:
            for cfg in dict_calls(text):
                if cfg.get('type') not in names:
                    continue
                seen.add(cfg['type'])
                cfg.pop('_delete_', None)
                if cfg['type'].endswith('Hook'):
                    registry.HOOKS.build(cfg)
                else:
                    cfg.pop('requires_grad', None)
                    registry.MODELS.build(dict(num_features=64, **cfg))
    assert {'SSN', 'SSNRadiusHook', 'SSNRatioHook'} <= seen


def known_names() -> set[str]:
    """Names that a page may use for something of the package, mmengine, mmdet, mmseg or torch."""
    init_default_scope('mmdet')
    import mmdet.models  # noqa: F401  (registers)
    import mmseg.models  # noqa: F401  (registers)

    # of mmpretrain and mmaction2, which are not here
    names = {*ssn_plugin.__all__, 'ArcFaceClsHead', 'TSMOptimWrapperConstructor'}
    for path in (ROOT / 'ssn_plugin').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
    for name in REGISTRIES:
        root = getattr(registry, name)
        names |= set(root.module_dict)
        for child in root.children.values():
            names |= set(child.module_dict)
    return names


def test_names_in_backticks_exist():
    known = known_names()
    pattern = re.compile(
        r'\b(?:SSN\w*|SN|Sync\w+|Selected\w+|\w+(?:Hook|Constructor|Head|ResNet))\b'
    )
    missing = {}
    for page in PAGES:
        for text in in_backticks(page):
            if '/' in text or '://' in text or text.isupper():  # a path, a variable
                continue
            unknown = set(pattern.findall(text)) - known
            unknown = {n for n in unknown if not n.isupper()}
            if unknown:
                missing.setdefault(page_name(page), set()).update(unknown)
    assert not missing


def test_files_that_pages_name_exist():
    pattern = re.compile(
        r'(?<!\.mim/)\b((?:tools|configs|docs|benchmarks|studies|tests|ssn_plugin|requirements)/[\w./+-]+'
        r'\.(?:py|md|sh|txt|csv))\b'
    )
    named, missing = set(), []
    for page in PAGES:
        for path in pattern.findall(page.read_text()):
            named.add(path)
            if not ((ROOT / path).exists() or (page.parent / path).exists()):
                missing.append(f'{page_name(page)}: {path}')
    assert len(named) > 20
    assert not missing


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line ``... tools/NAME.py ...`` as a list of words, variables filled in."""
    for language in ('bash', 'shell'):
        for text in blocks(page, language):
            variables = dict(re.findall(r'^(?:export )?(\w+)=(\S+)$', text, re.MULTILINE))
            for name, value in variables.items():
                text = re.sub(rf'\${name}\b', lambda _, value=value: value, text)
            for line in text.replace('\\\n', ' ').splitlines():
                words = shlex.split(line, comments=True)
                if any(re.fullmatch(r'(tools|benchmarks|docs)/\w+\.py', word) for word in words):
                    yield words


def test_options_of_tools_exist():
    # In the source of the tool or where it takes its arguments from; running all is too slow.
    shared = '\n'.join(path.read_text() for path in (ROOT / 'ssn_plugin').rglob('*.py'))
    count = 0
    for page in PAGES:
        for words in commands(page):
            at = next(
                i for i, w in enumerate(words) if re.fullmatch(r'(tools|benchmarks|docs)/.*', w)
            )
            source = (ROOT / words[at]).read_text() + shared
            for word in words[at + 1 :]:
                option = re.fullmatch(r'(--[a-z][a-z-]*)(=.*)?', word)
                if option:
                    count += 1
                    assert f"'{option.group(1)}'" in source, f'{page_name(page)}: {" ".join(words)}'
    assert count > 10


@every_page
def test_overrides_on_the_command_line_exist(page, tmp_path):
    own = [text for text in blocks(page, 'python') if '_base_' in text]
    for words in commands(page):
        configs = [w for w in words if w.startswith('configs/') and w.endswith('.py')]
        if '--cfg-options' not in words or not (configs or 'my_config.py' in words):
            continue
        config = as_config(f"_base_ = '{configs[0]}'" if configs else own[0], tmp_path)
        for word in words[words.index('--cfg-options') + 1 :]:
            if '=' not in word or word.startswith('-'):
                break
            *parents, last = word.partition('=')[0].split('.')
            if parents == ['randomness']:  # mmengine's own, which configs may leave out
                assert last == 'seed'
                continue
            node = config
            for key in parents:
                node = node[int(key)] if isinstance(node, list | tuple) else node[key]
            assert last in node, word
