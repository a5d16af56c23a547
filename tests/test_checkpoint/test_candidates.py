"""Names of candidates: by default, by the running statistics, by the text of a config."""

from collections import OrderedDict

import pytest
from torch import nn

from ssn_plugin import SN, SSN
from ssn_plugin.checkpoint.candidates import (
    Candidates,
    candidate_names,
    configured_candidates,
    record_candidates,
)
from ssn_plugin.checkpoint.traits import told_candidates
from ssn_plugin.errors import CheckpointError


@pytest.mark.parametrize(
    ('normalizers', 'names'),
    [
        (('IN', 'LN'), ('IN', 'LN')),
        (('IN', 'LN', 'BN'), ('IN', 'LN', 'BN')),
        (('IN', 'LN', 'BN', 'GN'), ('IN', 'LN', 'BN', 'GN')),
        (('IN', 'BN'), ('0', '1')),
        (('LN', 'IN'), ('IN', 'LN')),  # an order that nothing in a file tells
    ],
)
def test_default_names(normalizers, names):
    layer = SSN(32, normalizers=normalizers)
    state = {f'sn.{key}': value for key, value in layer.state_dict().items()}
    assert candidate_names(state, 'sn', len(normalizers)) == names
    for told in (
        Candidates(configured={len(normalizers): normalizers}),
        Candidates(backbone=normalizers),
    ):
        assert candidate_names(state, 'sn', len(normalizers), told) == normalizers


def test_candidates_of_several_counts_and_of_contradicting_layers():
    text = (
        "model = dict(a=dict(norm_cfg=dict(type='SSN', normalizers=('BN', 'LN', 'IN'))),\n"
        "             b=[{'type': 'ssn_plugin.SyncSSN', 'normalizers': ['IN', 'LN']}])\n"
    )
    assert configured_candidates(text) == {3: ('BN', 'LN', 'IN'), 2: ('IN', 'LN')}
    text += "head = dict(norm_cfg=dict(type='SN'))\n"
    configured = configured_candidates(text)
    assert configured[3] == ()
    state = {f'sn.{key}': value for key, value in SN(4).state_dict().items()}
    assert candidate_names(state, 'sn', 3, Candidates((), configured)) == ('0', '1', '2')
    told = Candidates(('LN', 'IN', 'BN'), configured)
    assert candidate_names(state, 'sn', 3, told) == ('LN', 'IN', 'BN')
    # Of a whole model, what is told of the backbone is told of nothing else.
    state |= {f'backbone.{key}': value for key, value in state.items()}
    assert candidate_names(state, 'backbone.sn', 3, told) == ('LN', 'IN', 'BN')
    assert candidate_names(state, 'sn', 3, told) == ('0', '1', '2')
    assert candidate_names(state, 'sn', 3, told._replace(configured={})) == ('LN', 'IN', 'BN')


@pytest.mark.parametrize(
    'text', ['', 'not a config (', "norm_cfg = dict(type='BN')", 'x = dict(type=y, normalizers=z)']
)
def test_texts_without_such_layers(text):
    assert configured_candidates(text) == {}


def test_a_config_is_read_and_not_run(tmp_path):
    text = f"open('{tmp_path / 'ran'}', 'w')\nnorm_cfg = dict(type='SSN')\n"
    assert configured_candidates(text) == {3: ('IN', 'LN', 'BN')}
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_an_old_file_is_compared_by_its_config(prefix):
    """Of a run before layers recorded their candidates, which its config names."""
    model = nn.Sequential(SSN(8, normalizers=('LN', 'GN', 'BN')))
    state = {prefix + key: value for key, value in model.state_dict().items()}
    config = "norm_cfg = dict(type='SSN', normalizers=('LN', 'GN', 'BN'))"
    checkpoint = {'meta': {'cfg': config}, 'state_dict': state}
    recorded = record_candidates(state, told_candidates(checkpoint))
    assert recorded._metadata['0']['normalizers'] == ('LN', 'GN', 'BN')
    plain = OrderedDict((key.removeprefix(prefix), value) for key, value in recorded.items())
    plain._metadata = recorded._metadata
    model.load_state_dict(plain)
    with pytest.raises(CheckpointError, match='candidates'):
        nn.Sequential(SSN(8)).load_state_dict(plain)


def test_what_nothing_tells_stays_without_a_record():
    state = dict(nn.Sequential(SSN(8)).state_dict())
    assert record_candidates(state, Candidates()) is state
    fresh = nn.Sequential(SSN(8)).state_dict()
    assert record_candidates(fresh, Candidates(configured={3: ('LN', 'GN', 'BN')})) is fresh
