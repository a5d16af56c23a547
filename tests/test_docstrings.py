"""Every public object has a docstring, and what the examples in docstrings print is true."""

import doctest
import importlib
import inspect
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope

import ssn_plugin
from ssn_plugin.torch_versions import EXPORTS_EVERY_SIZE, HAS_CUSTOM_OPS

# What the examples of a module take, beside what it takes to import it.
EXAMPLES = {
    'ssn_plugin.deploy.constant_ratios': EXPORTS_EVERY_SIZE,
    'ssn_plugin.models.collapsed_model': find_spec('mmdet'),
    'ssn_plugin.models.resnet': find_spec('mmdet'),
}
PACKAGE = Path(ssn_plugin.__file__).parent
# What a module cannot be imported without.
NEEDS = {
    'mmdet_resnet': 'mmdet',
    'mmseg_resnet': 'mmseg',
    'mmpretrain_resnet': 'mmpretrain',
    'mmpose_resnet': 'mmpose',
    'mmpretrain_dropout_head': 'mmpretrain',
    'demo_data': 'skimage',
    'plots': 'matplotlib',
    'figures': 'matplotlib',
    'history_plots': 'matplotlib',
    'selection_report': 'matplotlib',
    'curves': 'matplotlib',
    'report_page': 'jinja2',
    'kernels': 'triton',
}


def modules() -> list[str]:
    files = (path.relative_to(PACKAGE.parent).with_suffix('') for path in PACKAGE.rglob('*.py'))
    return sorted('.'.join(f.parts).removesuffix('.__init__') for f in files)


def load(name: str):
    for part, needed in NEEDS.items():
        if part in name.split('.'):
            pytest.importorskip(needed)
    if {'custom_ops', 'kernels'} & set(name.split('.')) and not HAS_CUSTOM_OPS:
        pytest.skip('torch is older than custom operators')
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def _leave_no_default_scope(monkeypatch):
    # An example begins without a default scope of mmengine, as in a new process, and one that sets
    # it sets it for no test after it.
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())


@pytest.mark.parametrize('name', modules())
def test_examples_run(name):
    if not EXAMPLES.get(name, True):
        pytest.skip('its example needs a newer torch, or mmdet')
    module = load(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report = []
    for test in finder.find(module, name):
        torch.manual_seed(0)
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, ''.join(report)


@pytest.mark.parametrize('name', modules())
def test_public_objects_have_docstrings(name):
    module = load(name)
    assert module.__doc__, name
    own = [
        value
        for key, value in vars(module).items()
        if not key.startswith('_') and getattr(value, '__module__', None) == name
    ]
    for value in own:
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), value


@pytest.mark.parametrize('name', sorted(set(ssn_plugin.__all__) - {'__version__'}))
def test_what_users_call_has_a_complete_docstring(name):
    value = getattr(ssn_plugin, name)
    text = inspect.getdoc(value)
    if name in ('SSN1d', 'SSN2d', 'SSN3d'):
        assert ':class:`SSN`' in text
        return
    assert 'Args:' in text
    assert 'Example:' in text
    for parameter in inspect.signature(value).parameters:
        assert f'\n    {parameter}: ' in text, f'{name}: {parameter} is not described'


def test_examples_that_fail_are_noticed():
    # Or the first test would pass on anything.
    test = doctest.DocTestParser().get_doctest('>>> 1 + 1\n3\n', {}, 'wrong', None, 0)
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1
