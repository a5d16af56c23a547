"""A training checkpoint as a small backbone file: what is in it, and what it leaves out."""

import os
import re
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from backbones import batch_norm_network, build, images, pretrained
from pickled_code import Marker
from plain_resnet import PlainResNet, relative_error
from released_files import released_checkpoint, released_file, released_state, save
from torch import nn

from ssn_plugin import SSN, set_radius
from ssn_plugin.checkpoint.files import read_checkpoint
from ssn_plugin.checkpoint.publish import publish_backbone
from ssn_plugin.errors import CheckpointError
from ssn_plugin.version import __version__

NARROW = dict(base_channels=4, stem_channels=4)


@pytest.fixture
def out(tmp_path):
    return tmp_path / 'out' / 'r18.pth'


@pytest.fixture(autouse=True)
def _folder(out):
    out.parent.mkdir()


def trained_model(radius=0.5, **kwargs):
    """A backbone some of whose layers are decided."""
    model = build('mmdet', **NARROW | kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(('mean_weight', 'var_weight')):
                parameter.normal_(std=0.5)
    set_radius(model, radius)
    return model


def training_checkpoint(model, prefix='backbone.'):
    """What mmengine writes for a whole detector: more than half of it is no weight."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    sum(y.square().mean() for y in model(images())).backward()
    optimizer.step()
    state = OrderedDict((prefix + key, value) for key, value in model.state_dict().items())
    head = nn.Sequential(nn.Conv2d(4, 4, 3), SSN(4))
    state |= OrderedDict((f'neck.{key}', value) for key, value in head.state_dict().items())
    return dict(
        meta=dict(epoch=1, iter=10, mmengine_version='0.10.7'),
        state_dict=state,
        message_hub=dict(),
        optimizer=optimizer.state_dict(),
        ema_state_dict={'steps': torch.tensor(1)},
    )


def selected(model):
    return {n: m.selected for n, m in model.named_modules() if isinstance(m, SSN)}


@pytest.mark.parametrize('radius', [0.0, 0.5, 1.0])
def test_backbone_of_a_whole_detector(tmp_path, out, radius):
    model = trained_model(radius)
    checkpoint = training_checkpoint(model)
    source = save(checkpoint, tmp_path / 'epoch_1.pth')
    model.eval()
    done = publish_backbone(source, out)

    read = torch.load(done.path, weights_only=True)
    assert set(read) == {'meta', 'state_dict'}
    assert list(read['state_dict']) == list(model.state_dict())
    fresh = build('mmdet', **NARROW)
    fresh.load_state_dict(read['state_dict'], strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    fresh.eval()
    with torch.no_grad():
        assert all(map(torch.equal, fresh(images()), model(images())))

    meta = read['meta']
    assert meta['selection'] == selected(model) == selected(fresh)
    assert done.selection == selected(model)
    assert meta['ssn_plugin'] == __version__
    assert meta['layout'] == done.layout == 'ResNet-18 with SSN'
    assert sum(meta['histogram'].values()) == 20
    if radius == 1:
        assert 'undecided' not in meta['histogram']

    # what was left out is told
    weights = set(checkpoint['state_dict'])
    assert set(done.left_out) == {key for key in weights if key.startswith('neck.')}
    assert set(done.left_out_beside) == {'meta', 'message_hub', 'optimizer', 'ema_state_dict'}
    backbone = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert os.path.getsize(done.path) < backbone + 500 * len(read['state_dict']) + 20_000
    assert os.path.getsize(done.path) < 0.7 * os.path.getsize(source)


@pytest.mark.parametrize('entries', [(), ('state_dict',), ('model', 'state_dict')])
def test_candidates_that_only_the_layers_record(tmp_path, out, entries):
    """A model of a user's own code, which wrote no ``meta``, and was compiled."""
    model = nn.ModuleDict(dict(backbone=nn.Sequential(SSN(8, normalizers=('LN', 'GN', 'BN')))))
    model['backbone'][0].select('GN', 'LN')
    checkpoint = nn.ModuleDict(dict(_orig_mod=model)).state_dict()
    for entry in reversed(entries):
        checkpoint = {entry: checkpoint}
    done = publish_backbone(save(checkpoint, tmp_path / 'own.pth'), out)
    assert done.selection == {'0': ('GN', 'LN')}
    state = torch.load(done.path, weights_only=True)['state_dict']
    model['backbone'].load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"got control .*\('LN', 'GN', 'BN'\)"):
        nn.Sequential(SSN(8)).load_state_dict(state)


@pytest.mark.parametrize('legacy', [True, False])
@pytest.mark.parametrize('depth', [18, 50])
def test_a_released_file(tmp_path, out, legacy, depth):
    """Shapes stay (1, C, 1, 1) or become (C,); the published file loads strictly either way."""
    source = released_file(tmp_path / 'ssn.pth', legacy, depth=depth)
    done = publish_backbone(source, out)
    assert set(done.left_out) == {'fc.weight', 'fc.bias'}
    assert set(done.left_out_beside) == {
        'epoch', 'model', 'best_prec1', 'optimizer', 'lr_scheduler'
    }  # fmt: skip
    cfg = dict(type='SSN', correction=1, momentum=0.003)
    strict = build('mmdet', depth=depth, norm_cfg=cfg)
    strict.load_state_dict(torch.load(done.path, weights_only=True)['state_dict'], strict=True)
    model = build('mmdet', depth=depth, norm_cfg=cfg, init_cfg=pretrained(done.path))
    model.init_weights()
    assert selected(model) == selected(strict) == done.selection
    model.double().eval()
    x = images()
    with torch.no_grad():
        pairs = zip(model(x.double()), PlainResNet(released_state(depth))(x), strict=True)
        assert max(relative_error(a, b) for a, b in pairs) < 1e-12


def test_no_tensor_drags_a_bigger_storage_along(tmp_path, out):
    """Weights sliced out of one big buffer, as some optimizers keep them."""
    state = released_state(width=4)
    flat = torch.cat([value.float().flatten() for value in state.values()])
    flat = torch.cat((flat, torch.zeros(1_000_000)))
    offset = 0
    for key, value in state.items():
        if value.is_floating_point():
            state[key] = flat[offset : offset + value.numel()].reshape(value.shape)
        offset += value.numel()
    source = save({'state_dict': state}, tmp_path / 'big.pth')
    assert os.path.getsize(source) > 4_000_000
    done = publish_backbone(source, out)
    assert os.path.getsize(done.path) < 600_000
    for key, value in torch.load(done.path, weights_only=True)['state_dict'].items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), key
        assert torch.equal(value, state[key])


def test_parameters_and_tensors_that_share_memory(tmp_path, out):
    state = released_state(width=4)
    state['layer1.1.conv1.weight'] = state['layer1.0.conv1.weight']
    state = OrderedDict(
        (k, nn.Parameter(v) if v.is_floating_point() else v) for k, v in state.items()
    )
    done = publish_backbone(save({'state_dict': state}, tmp_path / 'a.pth'), out)
    read = torch.load(done.path, weights_only=True)['state_dict']
    assert len({value.data_ptr() for value in read.values()}) == len(read)
    assert not any(value.requires_grad for value in read.values())


def test_the_hash_is_that_of_the_weights(tmp_path, out):
    state = released_state(width=4, undecided=0.5, radius=0.4)

    def name(state, **kwargs):
        source = save(released_checkpoint(state, **kwargs), tmp_path / 'in.pth', kwargs == {})
        return publish_backbone(source, out).path.name

    first = name(state)
    assert re.fullmatch(r'r18-[0-9a-f]{8}\.pth', first)
    assert name(state) == first
    assert name(state, module=False) == first
    assert name(state, classifier=False) == first
    seen = {first}
    for key in ('conv1.weight', 'layer4.1.sn2.bias', 'sn1.running_var', 'layer2.0.sn1.mean_weight'):
        changed = OrderedDict((k, v.clone()) for k, v in state.items())
        changed[key].view(-1)[-1] += 1e-6
        seen.add(name(changed))
    changed = OrderedDict((k, v.clone()) for k, v in state.items())
    changed['sn1.mean_fixed'] = 1 - changed['sn1.mean_fixed']
    seen.add(name(changed))
    assert len(seen) == 6
    assert {path.name for path in out.parent.iterdir()} == seen


def test_torch_alone_is_enough(tmp_path, out):
    """Neither numpy, which torch does without, nor mmengine; the hash is the same."""
    source = released_file(tmp_path / 'a.pth', width=4)
    code = (
        'import sys; sys.modules |= dict.fromkeys(["numpy", "mmengine"])\n'
        'from ssn_plugin.checkpoint.publish import publish_backbone\n'
        'print(publish_backbone(*sys.argv[1:]).path)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, source, out], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(publish_backbone(source, out).path)


def test_publishing_twice_changes_nothing_else(tmp_path, out):
    source = released_file(tmp_path / 'a.pth', width=4)
    before = (tmp_path / 'a.pth').read_bytes()
    paths = {publish_backbone(source, out).path for _ in range(2)}
    assert [path.name for path in out.parent.iterdir()] == [path.name for path in paths]
    assert (tmp_path / 'a.pth').read_bytes() == before
    # a published file is one again, under the same hash
    (path,) = paths
    assert publish_backbone(path, out).path == path


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path, out, dtype):
    state = released_state(width=4)
    state = OrderedDict((k, v.to(dtype) if v.is_floating_point() else v) for k, v in state.items())
    done = publish_backbone(save({'state_dict': state}, tmp_path / 'a.pth'), out)
    read = torch.load(done.path, weights_only=True)['state_dict']
    assert read['conv1.weight'].dtype == dtype
    assert torch.equal(read['conv1.weight'], state['conv1.weight'])


def test_the_stem_of_a_warm_start_is_passed_on(tmp_path, out):
    checkpoint = {'meta': {'stem_padding': 1}, 'state_dict': released_state(width=4)}
    done = publish_backbone(save(checkpoint, tmp_path / 'a.pth'), out)
    assert read_checkpoint(done.path)['meta']['stem_padding'] == 1
    done = publish_backbone(released_file(tmp_path / 'b.pth', width=4), out)
    assert 'stem_padding' not in read_checkpoint(done.path)['meta']


@pytest.mark.parametrize('kind', ['SN', 'BN'])
def test_other_norms(tmp_path, out, kind):
    state = (
        released_state(kind='SN', width=4)
        if kind == 'SN'
        else batch_norm_network('mmdet', **NARROW).state_dict()
    )
    done = publish_backbone(save({'state_dict': state}, tmp_path / 'a.pth'), out)
    assert done.layout == f'ResNet-18 with {kind}'
    chosen = {} if kind == 'BN' else {'undecided': 20}
    assert read_checkpoint(done.path)['meta']['histogram'] == chosen


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        ({'state_dict': {'patch_embed.weight': torch.ones(1)}}, 'holds no norm layers'),
        ({'epoch': 3}, 'holds no state dict of weights'),
        ([1], 'holds a list, expected a dict'),
        ({'state_dict': released_state(width=4), 'x': Marker('/nonexistent/ran')}, 'refused'),
    ],
    ids=['no norms', 'no weights', 'no dict', 'code'],
)
def test_bad_input_leaves_nothing(tmp_path, out, content, said):
    source = save(content, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=said) as caught:
        publish_backbone(source, out)
    assert str(caught.value).startswith(f'{source}: ')
    assert '\n' not in str(caught.value)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize('legacy', [True, False])
def test_truncated_input_leaves_nothing(tmp_path, out, legacy):
    source = tmp_path / 'a.pth'
    released_file(source, legacy, width=4)
    source.write_bytes(source.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match='truncated'):
        publish_backbone(source, out)
    assert list(out.parent.iterdir()) == []


def test_another_file_under_the_released_name(tmp_path, out):
    source = released_file(tmp_path / 'ssn_8x2_75.848.pth', width=4)
    with pytest.raises(CheckpointError, match='MD5'):
        publish_backbone(source, out)
    assert list(out.parent.iterdir()) == []


def test_bad_output(tmp_path, out):
    source = released_file(tmp_path / 'a.pth', width=4)
    with pytest.raises(CheckpointError, match=r'expected a name that ends in \.pth'):
        publish_backbone(source, out.parent)
    with pytest.raises(CheckpointError, match='there is no folder'):
        publish_backbone(source, out.parent / 'none' / 'r18.pth')
    assert list(out.parent.iterdir()) == []


def test_code_in_a_trusted_file(tmp_path, out):
    content = {'state_dict': released_state(width=4), 'x': Marker(tmp_path / 'ran')}
    done = publish_backbone(save(content, tmp_path / 'a.pth'), out, allow_pickle=True)
    assert (tmp_path / 'ran').exists()
    assert 'x' in done.left_out_beside
    assert set(torch.load(done.path, weights_only=True)) == {'meta', 'state_dict'}
