"""Norms of a file that are not those of the model, told part by part."""

import pytest
from torch import nn

from ssn_plugin import SN, SSN
from ssn_plugin.checkpoint.norm_kinds import norm_mismatch


def state(**parts) -> dict:
    return nn.ModuleDict(
        {name: nn.Sequential(nn.Conv2d(3, 4, 1), *norms) for name, norms in parts.items()}
    ).state_dict()


BN, GN = nn.BatchNorm2d, nn.GroupNorm


@pytest.mark.parametrize(
    ('own', 'loaded', 'told', 'remedy'),
    [
        ([SSN(4)] * 2, [BN(4)], '1 BN in backbone, where the model has 2 SSN', 'bn2ssn://f.pth'),
        ([SSN(4)], [SN(4)], '1 SN in backbone, where the model has 1 SSN', 'sn2ssn://f.pth'),
        ([BN(4)], [SSN(4)] * 3, '3 SSN in backbone, where the model has 1 BN', 'the config that'),
        ([GN(2, 4)], [SN(4)], '1 SN in backbone, where the model has 1 LN, GN or IN', 'the config'),
    ],
)
def test_another_kind(own, loaded, told, remedy):
    text = norm_mismatch(state(backbone=own), state(backbone=loaded), 'f.pth')
    assert text.startswith(f'f.pth has {told}: ')
    assert remedy in text


@pytest.mark.parametrize(
    ('own', 'loaded'),
    [
        (dict(backbone=[SSN(4)]), dict(backbone=[SSN(4)])),
        # a neck that is new, or that is not here any more
        (dict(backbone=[SSN(4)], neck=[SSN(4)]), dict(backbone=[SSN(4)])),
        (dict(backbone=[SSN(4)]), dict(backbone=[SSN(4)], neck=[BN(4)])),
        (dict(backbone=[BN(4)], neck=[SSN(4)]), dict(backbone=[BN(4)])),
        # a part with norms of several kinds has some of the file's
        (dict(backbone=[BN(4), SSN(4)]), dict(backbone=[BN(4)])),
        # not our business
        (dict(backbone=[BN(4)]), dict(backbone=[GN(2, 4)])),
        (dict(backbone=[SSN(4)]), dict(backbone=[])),
    ],
)
def test_what_is_as_it_should_be(own, loaded):
    assert norm_mismatch(state(**own), state(**loaded), 'f.pth') is None


def test_a_file_that_is_tested_is_not_to_be_converted():
    text = norm_mismatch(state(a=[SSN(4)]), state(a=[BN(4)]), 'f.pth', starts=False)
    assert text.endswith('take the config that it was trained with')


def test_one_part_of_several():
    own = state(backbone=[BN(4)], neck=[SSN(4)])
    loaded = state(backbone=[BN(4)], neck=[BN(4)])
    assert 'in neck' in norm_mismatch(own, loaded, 'f.pth')
