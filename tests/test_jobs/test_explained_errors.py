"""Errors that do not tell their cause get a line that does."""

import pytest
import torch
from torch import nn

from ssn_plugin.jobs.explained_errors import building, explained


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
