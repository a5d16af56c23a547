"""Who may import what: the order of the folders, and frameworks only where they belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssn_plugin

PACKAGE = Path(ssn_plugin.__file__).parent
FILES = sorted(PACKAGE.rglob('*.py'))

# A folder or module imports first-party code only from itself and from a lower level.
LEVEL = {
    'version': 0,
    'errors': 0,
    'torch_versions': 0,
    'shipped': 0,
    'ops': 1,
    'functional': 2,
    'layers': 3,
    'training': 4,
    'checkpoint': 4,
    'deploy': 4,
    'analysis': 5,
    'models': 6,
    'engine': 7,
    'jobs': 8,
    '__init__': 9,
    '__main__': 9,
}
TORCH_ALONE = {
    'errors',
    'torch_versions',
    'shipped',
    'ops',
    'functional',
    'layers',
    'training',
    'checkpoint',
}
FRAMEWORKS = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'mmpose', 'mmaction'}
MAY_IMPORT_FRAMEWORKS = {'models', 'engine', 'jobs'}


def part_of(path: Path) -> str:
    """First folder, or module, below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports_of(path: Path) -> list[str]:
    """Dotted names of everything a file imports, at its top or inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            names += [f'{node.module}.{alias.name}' for alias in node.names]
    return names


def first_party(path: Path) -> set[str]:
    names = (name.split('.') for name in imports_of(path))
    return {name[1] for name in names if name[0] == 'ssn_plugin'}


def third_party(path: Path) -> set[str]:
    names = {name.split('.')[0] for name in imports_of(path)}
    return names - {'ssn_plugin'} - set(sys.stdlib_module_names)


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    part = part_of(path)
    assert part in LEVEL, f'{part}: give it a place in LEVEL'
    for other in first_party(path) - {part}:
        assert other in LEVEL, f'{part} imports ssn_plugin.{other}'
        assert LEVEL[other] < LEVEL[part], f'{part} imports ssn_plugin.{other}'
    if part in TORCH_ALONE:
        kernels = {'triton'} if 'triton' in path.parent.parts else set()
        assert third_party(path) <= {'torch'} | kernels
    if part not in MAY_IMPORT_FRAMEWORKS:
        assert not third_party(path) & FRAMEWORKS


def test_the_scan_sees_imports():
    # Or the test above would pass on anything.
    assert first_party(PACKAGE / 'layers' / 'ssn.py') >= {'ops', 'functional', 'layers'}
    assert third_party(PACKAGE / 'layers' / 'ssn.py') == {'torch'}
    assert 'mmengine' in third_party(PACKAGE / 'engine' / 'registration.py')
    assert {part_of(path) for path in FILES} >= {'ops', 'functional', 'layers', 'models', 'engine'}


def test_contributing_says_the_same():
    text = (PACKAGE.parent / 'CONTRIBUTING.md').read_text()
    order = re.search(r'    \{errors.*?\n\n', text, re.DOTALL)[0].split('->')
    stated = {name: rank for rank, names in enumerate(order) for name in re.findall(r'\w+', names)}
    kept = {name: rank for name, rank in LEVEL.items() if not name.startswith('__')}
    assert stated == kept


# What names in several places mean by design: the backbone of each framework, the contract of all
# backends, and the paper's formulas, their fast form and their public form.
SEVERAL = {'SSNResNet', 'forward', 'backward', 'sparsestmax', 'switchable_norm'}


def test_a_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith('_'):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert set(twice) <= SEVERAL, twice


def test_there_is_no_grab_bag():
    assert not [
        path for path in FILES if path.stem in ('utils', 'util', 'helpers', 'common', 'misc')
    ]


def run(code: str) -> subprocess.CompletedProcess:
    # A fresh interpreter: in this one everything may be imported already.
    return subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=False,
    )


# Makes every import of the named packages fail, as if they were not installed.
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({names!r}))
"""


def test_torch_alone_is_enough_for_layers_and_functions():
    missing = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'numpy', 'rich', 'matplotlib', 'triton')
    result = run(
        WITHOUT.format(names=missing) + 'import torch\n'
        'from ssn_plugin import *\n'
        'model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8), SN(8))\n'
        'x = torch.randn(2, 3, 6, 6)\n'
        'model(x).square().sum().backward()\n'
        'ratios = sparsestmax(torch.randn(3), 0.9)\n'
        'assert switchable_norm(torch.randn(2, 4, 3, 3), ratios, ratios).shape == (2, 4, 3, 3)\n'
        'assert undecided_layers(model) == ["1"]\n'
        'set_radius(model, 1.0)\n'
        'assert not undecided_layers(model)\n'
        'expected = model.eval()(x)\n'
        'collapse_ssn(model)\n'
        'assert not isinstance(model[1], SSN)\n'
        'torch.testing.assert_close(model(x), expected)\n'
    )
    assert result.returncode == 0, result.stderr


def test_package_imports_and_registers_on_mmengine_alone():
    missing = ('mmdet', 'mmseg', 'mmpretrain', 'triton', 'skimage', 'matplotlib')
    result = run(
        WITHOUT.format(names=missing) + 'import torch, ssn_plugin\n'
        'from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS\n'
        'layer = MODELS.build(dict(type="SSN", num_features=4))\n'
        'layer(torch.randn(2, 4, 3, 3)).mean().backward()\n'
        'ssn_plugin.set_radius(layer, 1.0)\n'
        'assert HOOKS.get("SSNRadiusHook") and HOOKS.get("SSNRatioHook")\n'
        'assert OPTIM_WRAPPER_CONSTRUCTORS.get("SSNOptimWrapperConstructor")\n'
        'assert MODELS.get("SSNResNet") and MODELS.get("DropoutLinearClsHead")\n'
    )
    assert result.returncode == 0, result.stderr


def test_import_is_lean():
    result = run(
        'import sys, torch, ssn_plugin\n'
        'loaded = {name.split(".")[0] for name in sys.modules}\n'
        'heavy = {"mmdet", "mmseg", "mmpretrain", "triton", "skimage", "matplotlib"}\n'
        'heavy.add("torchvision")\n'
        'print(sorted(loaded & heavy), torch.cuda.is_initialized())\n'
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == '[] False'
