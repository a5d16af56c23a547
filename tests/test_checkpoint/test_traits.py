"""Candidates and stem of a backbone travel in its checkpoint, from training to loading."""

import logging
from types import SimpleNamespace

import pytest
from backbones import build, pretrained
from mmengine.logging import MMLogger
from released_files import save
from torch import nn

from ssn_plugin import SN, SSN, set_radius
from ssn_plugin.analysis.layer_ratios import layer_ratios_of_state
from ssn_plugin.checkpoint.candidates import recorded_candidates
from ssn_plugin.checkpoint.files import read_checkpoint
from ssn_plugin.checkpoint.inspection import inspect_checkpoint
from ssn_plugin.checkpoint.publish import publish_backbone
from ssn_plugin.checkpoint.traits import told_candidates, told_traits, traits_of
from ssn_plugin.engine.hooks.radius_hook import SSNRadiusHook
from ssn_plugin.errors import CheckpointError

ORDER = ('BN', 'IN', 'LN')


def test_of_a_module():
    assert traits_of(nn.Sequential(SSN(4), SN(4))) == {'normalizers': ['IN', 'LN', 'BN']}
    assert traits_of(nn.Sequential(SSN(4), SSN(4, normalizers=ORDER))) == {}  # no single answer
    for padding in (0, 1):
        traits = traits_of(build('mmdet', stem_padding=padding))
        assert traits['stem_padding'] == padding
        assert told_traits({'meta': traits})['stem_padding'] == padding


@pytest.mark.parametrize(
    'meta',
    [None, 'x', {'normalizers': 5}, {'normalizers': [['IN']]}, {'normalizers': ['IN', 'XN']},
     {'stem_padding': 'x'}],
)  # fmt: skip
def test_strange_metadata_tells_nothing(meta):
    assert told_traits({'meta': meta}) == {}


def published(tmp_path, normalizers):
    model = build('mmdet', norm_cfg=dict(type='SSN', normalizers=normalizers))
    set_radius(model, 1.0)
    save({'meta': traits_of(model), 'state_dict': model.state_dict()}, tmp_path / 'in.pth')
    return publish_backbone(tmp_path / 'in.pth', tmp_path / 'out.pth').path


def test_candidates_in_another_order_are_refused(tmp_path):
    path = published(tmp_path, ORDER)
    meta = read_checkpoint(path)['meta']
    assert meta['normalizers'] == list(ORDER)
    assert meta['histogram'] == {'LN': 20}  # the last candidate, at a tie
    report = inspect_checkpoint(path)
    assert report['candidates'] == 'BN, IN, LN'
    assert '20 LN' in report['selection']
    with pytest.raises(CheckpointError, match=r"choose among \('BN', 'IN', 'LN'\).*norm_cfg"):
        build('mmdet', init_cfg=pretrained(path)).init_weights()
    model = build('mmdet', norm_cfg=dict(type='SSN', normalizers=ORDER), init_cfg=pretrained(path))
    model.init_weights()
    assert model.sn1.selected == ('LN', 'LN')


def test_training_tells_them(tmp_path):
    model = build('mmdet', stem_padding=1, norm_cfg=dict(type='SSN', normalizers=ORDER))
    checkpoint = {'meta': {'epoch': 1}}
    SSNRadiusHook().before_save_checkpoint(SimpleNamespace(model=model, hooks=[]), checkpoint)
    expected = {'epoch': 1, 'normalizers': list(ORDER), 'stem_padding': 1, 'averaged_copies': []}
    assert checkpoint['meta'] == expected


def test_layers_of_a_head_are_named_by_their_own_candidates(tmp_path):
    others = ('LN', 'GN', 'BN')
    model = nn.ModuleDict({'backbone': SSN(4), 'neck': SSN(4, normalizers=others, num_groups=2)})
    set_radius(model, 1.0)
    config = "a = dict(type='SSN')\nb = dict(type='SSN', normalizers=('LN', 'GN', 'BN'))"
    checkpoint = {'meta': {'cfg': config}, 'state_dict': model.state_dict()}
    SSNRadiusHook().before_save_checkpoint(SimpleNamespace(model=model, hooks=[]), checkpoint)
    read = read_checkpoint(save(checkpoint, tmp_path / 'model.pth'))
    found = layer_ratios_of_state(read['state_dict'], told_candidates(read))
    assert {row.layer: tuple(row.ratios('mean')) for row in found} == {
        'backbone': ('IN', 'LN', 'BN'),
        'neck': others,
    }
    # Copied by hand, without the record, they have no names; never wrong ones.
    read['state_dict'] = dict(read['state_dict'])
    found = layer_ratios_of_state(read['state_dict'], told_candidates(read))
    assert tuple(found[1].ratios('mean')) == ('0', '1', '2')


@pytest.mark.parametrize(('trained', 'built'), [(0, 1), (1, 0), (0, 0), (1, 1)])
def test_another_stem_is_warned_of_in_both_directions(tmp_path, trained, built):
    path = tmp_path / 'trained.pth'
    model = build('mmdet', stem_padding=trained, norm_cfg=dict(type='SSN'))
    save({'meta': traits_of(model), 'state_dict': model.state_dict()}, path)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        build('mmdet', stem_padding=built, init_cfg=pretrained(path)).init_weights()
    finally:
        logger.removeHandler(handler)
    said = [text for text in messages if 'stem' in text and 'set stem_padding' in text]
    assert len(said) == (trained != built)
    if said:
        assert f'padding {trained}, this backbone pools with {built}' in said[0]
        assert f'set stem_padding={trained}' in said[0]


@pytest.mark.parametrize('record', [None, {}, {'neck': {}}, {'neck': {'normalizers': ['XN']}}])
def test_a_strange_record_tells_nothing(record):
    state = SSN(4).state_dict()
    state._metadata = record
    assert recorded_candidates(state) == {}
