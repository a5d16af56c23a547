"""bn2ssn:// and sn2ssn:// wherever a checkpoint is named; files behind addresses; real ones."""

import functools
import http.server
import logging
import os
import threading

import pytest
import torch
from backbones import (
    as_detector,
    as_mmpretrain,
    as_timm,
    as_torchvision,
    batch_norm_network,
    build,
    images,
    pretrained,
)
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader
from pickled_code import Marker
from plain_resnet import relative_error
from released_files import released_checkpoint, released_file, released_state, save

from ssn_plugin import SSN, undecided_layers
from ssn_plugin.checkpoint.files import read_checkpoint, weights_in
from ssn_plugin.checkpoint.warm_start import batch_norm_to_ssn
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.preflight import check_checkpoints
from ssn_plugin.models.pretrained import load_checkpoint


@pytest.fixture
def file(tmp_path):
    return tmp_path / 'net.pth'


@pytest.fixture
def network():
    return batch_norm_network('mmdet')


@pytest.fixture
def log():
    """Level and text of what is logged."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    logger = MMLogger.get_instance('schemes')
    logger.addHandler(handler)
    assert MMLogger.get_current_instance() is logger
    return lines


def loaded(address, framework='mmdet', kind='SSNResNet', **kwargs):
    model = build(framework, kind, **kwargs, init_cfg=pretrained(address))
    model.init_weights()
    return model


def assert_warm(model, state, ratio=0.9):
    """BN at the ratio everywhere, and the BatchNorm network's tensors."""
    own = model.state_dict()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, SSN)}
    assert len(norms) == 20
    for name, norm in norms.items():
        rest = (1 - ratio) / 2
        for ratios in (norm.mean_ratios, norm.var_ratios):
            assert ratios.tolist() == pytest.approx([rest, rest, ratio], abs=1e-6)
        theirs = name.replace('sn', 'bn')
        for key in ('weight', 'bias', 'running_mean', 'running_var'):
            assert torch.equal(own[f'{name}.{key}'], state[f'{theirs}.{key}']), name
    assert torch.equal(own['layer4.1.conv2.weight'], state['layer4.1.conv2.weight'])


# ---------------------------------------------------------------- bn2ssn://


@pytest.mark.parametrize('framework', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('rename', [as_torchvision, as_timm, as_mmpretrain, as_detector])
@pytest.mark.parametrize('kind', ['SSNResNet', 'ResNet'])
def test_a_file_with_batch_norm_in_any_config(framework, file, network, rename, kind):
    pytest.importorskip(framework)
    path = save({'state_dict': rename(network.state_dict())}, file)
    kwargs = dict(stem_padding=1) if kind == 'SSNResNet' else dict()
    model = loaded(f'bn2ssn://{path}', framework, kind, norm_cfg=dict(type='SSN'), **kwargs)
    assert_warm(model, network.state_dict())


def test_it_is_nearly_the_network_with_batch_norm(file, network):
    path = save(network.state_dict(), file)
    state = batch_norm_to_ssn(network.state_dict(), path, 0.9)
    model = loaded(f'bn2ssn://{path}', stem_padding=1)
    by_hand = build('mmdet', stem_padding=1)
    by_hand.load_state_dict(state, strict=True)
    model.eval()
    by_hand.eval()
    with torch.no_grad():
        assert all(map(torch.equal, model(images()), by_hand(images())))


@pytest.mark.parametrize('entry', ['state_dict', 'model', None])
@pytest.mark.parametrize('legacy', [True, False])
def test_wherever_the_weights_lie(file, network, entry, legacy):
    state = {f'module.{key}': value for key, value in network.state_dict().items()}
    path = save(state if entry is None else {entry: state}, file, legacy)
    assert_warm(loaded(f'bn2ssn://{path}', stem_padding=1), network.state_dict())


def test_relative_and_home_paths(tmp_path, network, monkeypatch):
    (tmp_path / 'weights').mkdir()
    save(network.state_dict(), tmp_path / 'weights' / 'net.pth')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    for path in ('weights/net.pth', './weights/net.pth', '~/weights/net.pth'):
        assert_warm(loaded(f'bn2ssn://{path}', stem_padding=1), network.state_dict())


@pytest.fixture
def zoo(network):
    """An address of a model zoo, as torchvision:// is one."""
    asked = []

    def load(filename, map_location=None):
        asked.append((filename, map_location))
        if not filename.endswith('resnet18'):
            raise KeyError(filename)
        return as_torchvision(network.state_dict())

    CheckpointLoader.register_scheme('test-zoo://', load)
    yield asked
    del CheckpointLoader._schemes['test-zoo://']


def test_nested_addresses(zoo, network):
    model = loaded('bn2ssn://test-zoo://resnet18', stem_padding=1)
    assert_warm(model, network.state_dict())
    assert zoo == [('test-zoo://resnet18', 'cpu')]
    loaded('bn2ssn://test-zoo://resnet18', kind='ResNet', norm_cfg=dict(type='SSN'))
    with pytest.raises(CheckpointError, match="test-zoo://resnet1: cannot be read: KeyError: '"):
        loaded('bn2ssn://test-zoo://resnet1', stem_padding=1)


def test_fewer_stages(file, network):
    short = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
    model = loaded(f'bn2ssn://{save(network.state_dict(), file)}', stem_padding=1, **short)
    assert torch.equal(model.layer2[1].conv2.weight, network.layer2[1].conv2.weight)


@pytest.mark.parametrize(
    ('address', 'content', 'said'),
    [
        ('bn2ssn://{path}', lambda: released_state(), 'holds SSN layers, expected BatchNorm'),
        (
            'bn2ssn://{path}',
            lambda: released_state(kind='SN'),
            'holds SN layers, expected BatchNorm',
        ),
        ('bn2ssn://{path}', lambda: {'a': torch.ones(1)}, 'holds no norm layers'),
        ('bn2ssn://{path}', None, 'no such file'),
        ('sn2ssn://{path}', None, 'no such file'),
        (
            'bn2ssn://bn2ssn://{path}',
            lambda: batch_norm_network('mmdet').state_dict(),
            'SSN layers',
        ),
        (
            'sn2ssn://bn2ssn://{path}',
            lambda: batch_norm_network('mmdet').state_dict(),
            'SSN layers',
        ),
        ('bn2ssn://nowhere://{path}', None, 'cannot be read: FileNotFoundError'),
        ('bn2ssn://', None, ': no such file'),
        ('nowhere://net', None, 'cannot be read: FileNotFoundError'),
    ],
)
@pytest.mark.parametrize('kind', ['SSNResNet', 'preflight'])
def test_what_cannot_be_converted(file, address, content, said, kind):
    path = save(content(), file) if content else str(file)
    address = address.format(path=path)
    if kind == 'preflight':
        backbone = dict(type='SSNResNet', init_cfg=pretrained(address))
        with pytest.raises(InputError, match=said) as caught:
            check_checkpoints(Config(dict(model=dict(backbone=backbone))))
        assert str(caught.value).startswith('model.backbone.init_cfg.checkpoint: ')
    else:
        with pytest.raises(CheckpointError, match=said) as caught:
            loaded(address)
    assert '\n' not in str(caught.value)


def test_another_architecture(file):
    path = save(batch_norm_network('mmdet', depth=34).state_dict(), file)
    with pytest.raises(CheckpointError, match='holds a ResNet-34 with SSN, expected a ResNet-18'):
        loaded(f'bn2ssn://{path}')


@pytest.mark.parametrize('normalizers', [('BN', 'IN'), ('GN', 'LN', 'BN', 'IN')])
@pytest.mark.parametrize('kind', ['SSNResNet', 'ResNet'])
def test_the_candidates_are_those_of_the_layers(file, network, normalizers, kind):
    path = save(network.state_dict(), file)
    cfg = dict(type='SSN', normalizers=normalizers, num_groups=2)
    model = loaded(f'bn2ssn://{path}', kind=kind, norm_cfg=cfg)
    rest = 0.1 / (len(normalizers) - 1)
    expected = [0.9 if name == 'BN' else rest for name in normalizers]
    for norm in (module for module in model.modules() if isinstance(module, SSN)):
        assert norm.mean_ratios.tolist() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- the stem


@pytest.mark.parametrize(('padding', 'warned'), [(0, True), (1, False)])
def test_a_shifted_stem_is_warned_of(file, network, log, padding, warned):
    loaded(f'bn2ssn://{save(network.state_dict(), file)}', stem_padding=padding)
    warnings = [text for level, text in log if level == 'WARNING']
    assert len(warnings) == warned
    if warned:
        assert 'pools with padding 1' in warnings[0]
        assert 'set stem_padding=1' in warnings[0]
    assert len([text for _, text in log if 'weights and buffers filled' in text]) == 1


def test_files_of_the_release_are_not_warned_of(file, log):
    loaded(released_file(file))
    loaded(f'sn2ssn://{released_file(file, kind="SN")}')
    assert [text for level, text in log if level == 'WARNING'] == []


@pytest.mark.parametrize('meta', [None, 'text', 3, [], {}, {'stem_padding': None}])
def test_strange_metadata(file, log, meta):
    loaded(save(released_checkpoint(released_state()) | {'meta': meta}, file))
    assert [text for level, text in log if level == 'WARNING'] == []


@pytest.mark.parametrize('framework', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('padding', [2, -1, 0.5, '1', None, (1, 1)])
def test_invalid_stem_padding(framework, padding):
    with pytest.raises(ValueError, match=r'^stem_padding: got .*, expected 0 or 1$'):
        build(framework, stem_padding=padding)


@pytest.mark.parametrize('deep', [False, True])
def test_the_two_stems(deep):
    """The pool is that of the release, or that of the framework."""
    released = build('mmdet', deep_stem=deep)
    usual = build('mmdet', deep_stem=deep, stem_padding=1)
    stock = build('mmdet', 'ResNet', deep_stem=deep, norm_cfg=dict(type='SSN'))
    x = images(2, 65).relu()
    assert torch.equal(usual.maxpool(x), stock.maxpool(x))
    assert not torch.equal(released.maxpool(x)[..., :32, :32], stock.maxpool(x)[..., :32, :32])


# ---------------------------------------------------------------- behind an address


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a server on this machine, and the folder it serves."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield f'http://127.0.0.1:{httpd.server_port}', folder
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.mark.parametrize('legacy', [True, False])
def test_files_behind_http(server, network, legacy):
    address, folder = server
    save(released_checkpoint(released_state()), folder / 'ssn.pth', legacy)
    save(network.state_dict(), folder / 'bn.pth', legacy)
    model = loaded(f'{address}/ssn.pth')
    assert torch.equal(model.conv1.weight, released_state()['conv1.weight'])
    assert_warm(loaded(f'bn2ssn://{address}/bn.pth', stem_padding=1), network.state_dict())
    with pytest.raises(
        CheckpointError, match=r'none\.pth: cannot be read: HTTPError: HTTP Error 404'
    ):
        loaded(f'{address}/none.pth')


@pytest.mark.parametrize('prefix', ['', 'bn2ssn://', 'sn2ssn://'])
@pytest.mark.parametrize('forced', [None, '1'])
@pytest.mark.parametrize('legacy', [True, False])
def test_code_behind_http_is_not_run(server, tmp_path, monkeypatch, prefix, forced, legacy):
    """Where mmengine and torch.hub ask for unpickling by themselves."""
    address, folder = server
    monkeypatch.delenv('SSN_ALLOW_PICKLE', raising=False)
    if forced:
        monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', forced)
    save({'state_dict': released_state(), 'x': Marker(tmp_path / 'ran')}, folder / 'a.pth', legacy)
    with pytest.raises(CheckpointError, match=r'it holds a pickled posix\.system') as caught:
        loaded(f'{prefix}{address}/a.pth')
    assert 'SSN_ALLOW_PICKLE=1' in str(caught.value)
    assert not (tmp_path / 'ran').exists()
    assert os.environ.get('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD') == forced
    # the flag, for those who trust it
    monkeypatch.setenv('SSN_ALLOW_PICKLE', '1')
    load_checkpoint(f'{address}/a.pth')
    assert (tmp_path / 'ran').exists()


def test_code_behind_another_address_is_not_run(tmp_path, file):
    """A scheme that unpickles whatever it finds, as several of mmengine's do when refused."""
    path = save({'state_dict': released_state(), 'x': Marker(tmp_path / 'ran')}, file)
    CheckpointLoader.register_scheme(
        'test-careless://', lambda name, map_location=None: torch.load(path, weights_only=False)
    )
    try:
        for address in ('test-careless://a', 'bn2ssn://test-careless://a'):
            with pytest.raises(CheckpointError, match='refused'):
                loaded(address)
        assert not (tmp_path / 'ran').exists()
    finally:
        del CheckpointLoader._schemes['test-careless://']


def test_code_in_any_file_of_a_config_is_not_run(tmp_path, file):
    """Before mmengine, which would fall back to unpickling, gets to see it."""
    path = save({'state_dict': released_state(), 'x': Marker(tmp_path / 'ran')}, file)
    stock = dict(model=dict(backbone=dict(type='ResNet', init_cfg=pretrained(path))))
    for config in (stock, dict(load_from=path), dict(model=dict(pretrained=path))):
        with pytest.raises(InputError, match='refused') as caught:
            check_checkpoints(Config(config))
        assert '\n' not in str(caught.value)
    assert not (tmp_path / 'ran').exists()


def test_code_in_a_file_for_the_stock_resnet_is_not_run(tmp_path, file, network):
    """mmengine loads it there; the prefix reads it all the same."""
    path = save({'state_dict': network.state_dict(), 'x': Marker(tmp_path / 'ran')}, file)
    with pytest.raises(CheckpointError, match='refused'):
        loaded(f'bn2ssn://{path}', kind='ResNet', norm_cfg=dict(type='SSN'))
    assert not (tmp_path / 'ran').exists()


# ---------------------------------------------------------------- checkpoints of a training


def test_a_checkpoint_of_mmengine_is_read_without_a_flag(make_runner, monkeypatch):
    """Log histories and numpy scalars are beside the weights, and are not what is asked for."""
    runner = make_runner(validate=True)
    runner.train()
    monkeypatch.delenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')
    path = os.path.join(runner.work_dir, 'iter_12.pth')
    with pytest.raises(Exception, match='HistoryBuffer'):
        torch.load(path, weights_only=True)
    checkpoint = read_checkpoint(path)
    assert checkpoint['message_hub']['log_scalars']
    assert checkpoint['meta']['iter'] == 12
    state = weights_in(checkpoint, path)
    own = runner.model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in state.items())
    assert undecided_layers(runner.model) == []
    check_checkpoints(Config(dict(load_from=path)))
    # as by torch itself with everything allowed
    trusted = read_checkpoint(path, allow_pickle=True)
    assert type(trusted['message_hub']['log_scalars']['train/loss']).__name__ == 'HistoryBuffer'
    assert (
        relative_error(state['norm1.weight'], trusted['state_dict']['norm1.weight'].double()) == 0
    )
