"""Errors that do not tell their cause get a line that does."""

import importlib.metadata

import pytest
import torch
from mmengine.runner import BaseLoop
from torch import nn

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.configs import load_config
from ssn_plugin.jobs.explained_errors import before_the_work, building, explained


def caught(call) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011  (whatever torch raises)
        call()
    return raised.value


def test_one_value_per_channel():
    branch = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    model = nn.ModuleDict({'decode_head': nn.Sequential(nn.Identity(), branch)})
    error = caught(lambda: model['decode_head'](torch.ones(1, 3, 4, 4)))
    text = explained(error)
    assert text.startswith('1.1: got one value per channel')  # in what was called
    assert 'at least 2 images per process' in text
    assert "dict(type='SSN'" in text
    assert '\n' not in text


def test_a_label_beyond_the_classes():
    logits = torch.randn(2, 19, requires_grad=True)
    error = caught(lambda: nn.functional.cross_entropy(logits, torch.tensor([0, 25])))
    text = explained(error)
    assert text.startswith('labels: got 25')
    assert 'num_classes' in text


def test_any_other_error_speaks_for_itself():
    assert explained(ValueError('x: got 1, expected 2')) is None


class Loop(BaseLoop):
    """A loop whose data, or whose work, fails."""

    def __init__(self, fails: str) -> None:
        self.fails = fails
        if fails == 'built':
            raise TypeError('no such\nargument')

    def run(self) -> None:
        raise TypeError('in the middle')


def test_what_is_built_from_the_config_is_the_configs_fault():
    """But an error of the training itself keeps its trace."""
    text = before_the_work(caught(lambda: Loop('built')))
    assert text.startswith('config: the run cannot be built: TypeError: no such (')
    assert '\n' not in text
    assert f'{__file__}, line ' in text
    assert before_the_work(caught(Loop('runs').run)) is None


def test_what_was_being_built():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            nn.GroupNorm(32, 48)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            try:
                Inner()
            except ValueError as error:
                raise ValueError(f'class `Inner` in a/b.py: {error}')  # noqa: B904  (as a registry)

    assert building(caught(Outer)) == 'Outer > Inner > GroupNorm'


@pytest.mark.parametrize(
    ('bases', 'remedy'),
    [
        ("'one.py', 'two.py'", 'write its entries into this config, its hooks at the end of'),
        ("'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'", "__import__('mmseg')"),
    ],
)
def test_bases_that_mmengine_refuses(tmp_path, bases, remedy):
    for name in ('one.py', 'two.py'):
        (tmp_path / name).write_text('custom_hooks = []\n')
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = [{bases}]\n')
    installed = {each.metadata['Name'] for each in importlib.metadata.distributions()}
    if 'mmseg' in bases and 'mmsegmentation' in installed:
        pytest.skip('mmseg:: resolves here')
    with pytest.raises(InputError) as raised:
        load_config(str(config))
    assert remedy in str(raised.value)
    assert '\n' not in str(raised.value)
