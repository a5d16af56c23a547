"""Every key of a backbone and of a file is accounted for."""

import re
from collections import OrderedDict

import pytest
import torch
from backbones import as_mmpretrain, as_timm, as_torchvision, batch_norm_network, build
from released_files import released_state

from ssn_plugin.checkpoint.matching import check_match, check_shortcuts, in_names_of
from ssn_plugin.errors import CheckpointError

NARROW = dict(base_channels=4, stem_channels=4)


@pytest.fixture(scope='module')
def own():
    return build('mmdet', **NARROW).state_dict()


@pytest.fixture(scope='module')
def own50():
    return build('mmdet', depth=50, **NARROW).state_dict()


def message_of(own, loaded) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_match(own, loaded, 'net.pth')
    text = str(caught.value)
    assert '\n' not in text
    assert text.startswith('net.pth: does not fill the backbone')
    return text


@pytest.mark.parametrize('depth', [18, 50])
def test_files_that_fill_it(own, own50, depth):
    own = own if depth == 18 else own50
    state = released_state(depth, 4)
    check_match(own, state, 'net.pth')
    check_match(own, {k: v for k, v in state.items() if not k.startswith('fc.')}, 'net.pth')
    check_match(own, own, 'net.pth')
    check_match(own, dict(state) | {'head.fc.bias': torch.ones(1)}, 'net.pth')


@pytest.mark.parametrize('depth', [18, 50])
def test_every_single_key_is_missed(own, own50, depth):
    own = own if depth == 18 else own50
    state = released_state(depth, 4)
    wanted = [key for key in state if not key.startswith('fc.')]
    assert len(wanted) == len([key for key in own if not key.endswith('num_batches_tracked')])
    for key in wanted:
        text = message_of(own, {k: v for k, v in state.items() if k != key})
        assert text.endswith(f': missing {key}'), key


def test_every_single_shape_counts(own):
    """One number less, one more, transposed, or without the dimensions that convolutions need."""
    state = released_state(18, 4)
    for key, value in state.items():
        if key.startswith('fc.'):
            continue
        wrong = [torch.cat((value.flatten(), value.flatten()[:1]))]
        if value.numel() > 1:
            wrong.append(value.flatten()[1:])
        if value.dim() == 4 and key.rpartition('.')[2] == 'weight' and '.sn' not in f'.{key}':
            if 'downsample.1' in key:
                continue
            wrong += [value.flatten(), value.flatten(1), value[None], value.squeeze()]
            wrong += [value.transpose(0, 1)] if value.shape[0] != value.shape[1] else []
            wrong = [tensor for tensor in wrong if tensor.shape != value.shape]
        for tensor in wrong:
            text = message_of(own, state | {key: tensor})
            expected = (
                f'of another shape {key} is {list(tensor.shape)}, expected {list(own[key].shape)}'
            )
            assert text.endswith(expected), key


@pytest.mark.parametrize(
    'key',
    [
        'conv2.weight',
        'sn1.mean_weights',
        'bn1.weight',
        'layer1.0.conv3.weight',
        'layer1.2.conv1.weight',
        'layer1.0.downsample.0.weight',
        'layer5.0.conv1.weight',
        'stem.0.weight',
        'fc2.weight',
        'head.weight',
        'module.conv1.weight',
        'backbone.conv1.weight',
        '',
    ],
)
def test_every_other_key_is_unexpected(own, key):
    text = message_of(own, released_state(18, 4) | {key: torch.ones(2)})
    assert text.endswith(f': unexpected {key}')


def test_all_that_is_wrong_is_said_at_once(own):
    state = released_state(18, 4)
    for key in ('conv1.weight', 'sn1.bias', 'sn1.radius', 'layer1.0.sn1.radius'):
        del state[key]
    state['layer1.0.sn1.bias'] = torch.ones(5)
    state['a'] = state['b'] = torch.ones(1)
    text = message_of(own, state)
    assert 'missing conv1.weight, sn1.bias, sn1.radius and 1 more; ' in text
    assert 'unexpected a, b; ' in text
    assert text.endswith('of another shape layer1.0.sn1.bias is [5], expected [4]')


def test_batch_counters_may_be_absent_but_not_strange(own):
    check_match(own, released_state(18, 4), 'net.pth')
    counters = {key: torch.tensor(5) for key in own if key.endswith('num_batches_tracked')}
    assert len(counters) == 20
    check_match(own, released_state(18, 4) | counters, 'net.pth')
    text = message_of(own, released_state(18, 4) | {'sn1.num_batches_tracked': torch.ones(2)})
    assert 'sn1.num_batches_tracked is [2], expected []' in text


@pytest.mark.parametrize('stages', [1, 2, 3])
def test_stages_that_the_backbone_lacks_are_left_alone(stages):
    lists = dict(strides=(1, 2, 2)[:stages], dilations=(1, 1, 1)[:stages], out_indices=(0,))
    short = build('mmdet', **NARROW, num_stages=stages, **lists).state_dict()
    state = released_state(18, 4)
    check_match(short, state, 'net.pth')
    for key in (f'layer{stages}.1.conv2.weight', 'sn1.var_fixed'):
        text = message_of(short, {k: v for k, v in state.items() if k != key})
        assert text == f'net.pth: does not fill the backbone: missing {key}'


def test_stages_that_the_file_lacks_are_missed(own):
    state = {k: v for k, v in released_state(18, 4).items() if not k.startswith('layer3.')}
    assert 'missing layer3.0.conv1.weight' in message_of(own, state)


@pytest.mark.parametrize(
    ('held', 'expected', 'said'),
    [
        ('SN', 'SSN', "(it holds SN layers, expected SSN; take it as 'sn2ssn://net.pth' to"),
        ('BN', 'SSN', "(it holds BN layers, expected SSN; take it as 'bn2ssn://net.pth' to"),
        ('BN', 'SN', '(it holds BN layers, expected SN)'),
        ('SSN', 'SN', '(it holds SSN layers, expected SN)'),
        ('GN', 'SSN', '(it holds GN layers, expected SSN)'),
        ('SSN', 'GN', '(it holds SSN layers, expected GN)'),
    ],
)
def test_the_wrong_norm_is_named(held, expected, said):
    def state(kind):
        cfg = dict(type=kind, num_groups=2) if kind == 'GN' else dict(type=kind)
        return build('mmdet', **NARROW, norm_cfg=cfg).state_dict()

    assert said in message_of(state(expected), state(held))


def test_batch_norm_under_its_own_names(own):
    assert 'bn2ssn://net.pth' in message_of(own, batch_norm_network('mmdet', **NARROW).state_dict())


@pytest.mark.parametrize(('held', 'expected'), [(101, 50), (50, 101), (50, 18), (18, 50), (34, 18)])
def test_the_wrong_depth_is_named(held, expected):
    text = message_of(
        build('mmdet', depth=expected, **NARROW).state_dict(), released_state(held, 4)
    )
    assert f'(it holds a ResNet-{held} with SSN, expected a ResNet-{expected} with SSN): ' in text


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'student.backbone.', 'encoder.'])
def test_a_prefix_is_found(own, prefix):
    state = released_state(18, 4)
    theirs = {prefix + key: value for key, value in state.items()} | {
        'neck.0.weight': state['fc.bias']
    }
    renamed = in_names_of(own, theirs)
    assert (renamed.prefix, renamed.by_order) == (prefix, ())
    assert all(renamed.state[key] is value for key, value in state.items())


def as_mmaction(state):
    """Every convolution and norm in a ConvModule, as in mmaction2; fc is elsewhere."""
    renamed = OrderedDict()
    for key, value in state.items():
        place, _, entry = key.rpartition('.')
        number = re.search(r'(conv|bn)(\d)$', place)
        if number:
            place = f'{place[: number.start()]}conv{number[2]}.{number[1]}'
        elif 'downsample' in place:
            place = place.replace('.0', '.conv').replace('.1', '.bn')
            place = re.sub(r'layer(\d)\.(conv|bn)', r'layer\1.0', place)
        else:
            place = place.replace('stem.', 'stem.all.')
        renamed[f'{place}.{entry}'] = value
    return renamed | {'cls_head.fc_cls.weight': torch.rand(10, 7)}


DEEP = dict(depth=50, deep_stem=True, stem_channels=8)


@pytest.mark.parametrize(
    ('rename', 'kwargs', 'by_order'),
    [
        (as_torchvision, dict(depth=50), 0),
        (as_timm, DEEP, 6),
        (as_timm, DEEP | dict(avg_down=True), 6),
        (as_mmpretrain, DEEP, 6),
        (as_mmpretrain, DEEP | dict(avg_down=True), 8),
        (as_mmaction, dict(depth=18), 40),
        (as_mmaction, DEEP, 110),
    ],
)
@pytest.mark.parametrize('norm', ['BN', 'SSN'])
def test_names_of_every_codebase(rename, kwargs, by_order, norm):
    """Values are those of the place, whatever it is called; SSN places take the BN of the file."""
    state = batch_norm_network('mmdet', **NARROW | kwargs).state_dict()
    own = build('mmdet', **NARROW | kwargs, norm_cfg=dict(type=norm)).state_dict()
    renamed = in_names_of(own, rename(state))
    assert len(renamed.by_order) == by_order
    expected = {
        '.'.join(re.sub('^bn', 'sn' if norm == 'SSN' else 'bn', part) for part in key.split('.')): v
        for key, v in state.items()
    }
    assert all(renamed.state[key] is value for key, value in expected.items())


@pytest.mark.parametrize(
    ('parts', 'filled'),
    [
        (['backbone'], ['backbone']),
        (['teacher.backbone', 'student.backbone'], ['teacher.backbone', 'student.backbone']),
        (['blocks.0', 'blocks.1', 'blocks.2'], []),
    ],
)
def test_a_file_of_a_part(parts, filled):
    file = {'conv.weight': torch.randn(2, 2), 'bn.weight': torch.randn(2)}
    own = {f'{part}.conv.weight': torch.ones(2, 2) for part in parts}
    own |= {f'{part}.sn.weight': torch.ones(2) for part in parts} | {'head.bias': torch.ones(3)}
    state = in_names_of(own, file).state
    assert [key for key in own if key in state and key.endswith('sn.weight')] == [
        f'{part}.sn.weight' for part in filled
    ]
    assert all(torch.equal(state[f'{part}.sn.weight'], file['bn.weight']) for part in filled)


def test_order_explains_no_other_network(own):
    """One layer more, one less, or another width: nothing is matched by chance."""
    for depth, width in ((34, 4), (50, 4), (18, 8)):
        theirs = batch_norm_network('mmdet', depth=depth, base_channels=width, stem_channels=width)
        renamed = in_names_of(own, as_mmaction(theirs.state_dict()))
        assert renamed.by_order == ()


def test_shortcuts_that_pool_are_no_others(own50):
    state = batch_norm_network('mmdet', depth=50, **NARROW, avg_down=True).state_dict()
    with pytest.raises(CheckpointError, match=r'average-pooled shortcuts.*, expected a ResNet-50'):
        check_shortcuts(own50, state, '', 'net.pth')


def test_new_parts_are_told_from_missing_ones(own):
    """Deformable convolutions and plugins have layers that no file has; blocks are no such."""
    new = {
        'layer2.0.conv2.conv_offset.weight': torch.ones(2),
        'layer3.1.context_block2.conv_mask.bias': torch.ones(1),
    }
    assert check_match(own | new, released_state(18, 4), 'net.pth') == tuple(new)
    for key in ('layer2.2.conv1.weight', 'layer5.0.conv1.weight', 'layer2.0.conv2.bias'):
        assert f'missing {key}' in message_of(own | {key: torch.ones(1)}, released_state(18, 4))


def test_no_resnet_at_all(own):
    assert '(it holds no ResNet)' in message_of(own, {'features.0.weight': torch.ones(1)})
