"""A collapsed pair of config and checkpoint: what is written, and what is refused."""

import copy
import os
import resource
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from decided_models import decided_model, small_segmentor
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import DefaultScope

from ssn_plugin import SSN, collapse_ssn
from ssn_plugin.checkpoint.inspection import inspect_checkpoint
from ssn_plugin.deploy.collapse import choices_of
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.collapse import collapse_checkpoint


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    """A folder with images, and with the config and the checkpoint of a decided segmentor."""
    folder = tmp_path_factory.mktemp('source')
    (folder / 'images').mkdir()
    noise = np.random.default_rng(0)
    for name in ('a.png', 'b.jpg'):
        cv2.imwrite(str(folder / 'images' / name), noise.integers(0, 255, (40, 50, 3), np.uint8))
    (folder / 'images/notes.txt').write_text('no image')
    save(folder, 'net', correction=1)
    return folder


def save(folder: Path, name: str, **norm_cfg) -> None:
    (folder / f'{name}.py').write_text(small_segmentor(**norm_cfg).pretty_text)
    torch.save(
        {
            'meta': {'dataset_meta': {'classes': ('a', 'b')}, 'iter': 7, 'cfg': 'old'},
            'state_dict': decided_model(small_segmentor(**norm_cfg)).state_dict(),
            'optimizer': {'state': torch.zeros(1000)},
            'message_hub': {'log_scalars': {'loss': HistoryBuffer([0.5], [1])}},
        },
        folder / f'{name}.pth',
    )


def collapse(source: Path, out: Path, name: str = 'net', **settings):
    settings = {'images': [str(source / 'images')]} | settings
    return collapse_checkpoint(
        str(source / f'{name}.py'), str(source / f'{name}.pth'), str(out), **settings
    )


def test_what_is_written(source, tmp_path):
    done = collapse(source, tmp_path / 'out.pth')
    assert (done.checkpoint, done.config) == (tmp_path / 'out.pth', tmp_path / 'out.py')
    assert sorted(os.listdir(tmp_path)) == ['out.pth', 'out.py']
    assert done.comparison.images == 2
    assert 0 <= done.comparison.largest <= 1e-5
    assert done.comparison.labels == done.comparison.equal_labels == 2 * 40 * 50
    assert done.size == (128, 160)

    trained = decided_model(small_segmentor(correction=1))
    saved = torch.load(tmp_path / 'out.pth', weights_only=True)
    expected = collapse_ssn(trained).state_dict()
    assert saved.keys() == {'meta', 'state_dict'}
    assert saved['state_dict'].keys() == expected.keys()
    assert all(torch.equal(saved['state_dict'][key], expected[key]) for key in expected)
    assert saved['meta']['dataset_meta'] == {'classes': ('a', 'b')}
    assert saved['meta']['cfg'] == (tmp_path / 'out.py').read_text()
    chosen = choices_of(decided_model(small_segmentor(correction=1)))
    assert saved['meta']['collapsed'] == chosen
    config = Config.fromfile(tmp_path / 'out.py')
    assert config.model.type == 'CollapsedSSN'
    assert {name: tuple(pair) for name, pair in config.model.choices.items()} == chosen
    assert sum(done.layers.values()) == len(config.model.choices)
    assert done.undecided == ()
    params = sum(parameter.numel() for parameter in trained.parameters())
    assert done.after.params == params
    assert done.before.params == params + 6 * len(config.model.choices)


def test_the_file_says_what_each_norm_is(source, tmp_path):
    """LN, GN and IN hold the same tensors."""
    source_layers = decided_model(small_segmentor())
    names = [name for name, layer in source_layers.named_modules() if isinstance(layer, SSN)]
    pairs = [('LN', 'LN'), ('GN', 'GN'), ('BN', 'BN'), ('LN', 'BN'), ('LN', 'LN'), ('GN', 'GN')]
    for name, pair in zip(names, pairs, strict=True):
        source_layers.get_submodule(name).select(*pair)
    (tmp_path / 'net.py').write_text(small_segmentor().pretty_text)
    torch.save({'state_dict': source_layers.state_dict()}, tmp_path / 'net.pth')
    done = collapse(source, tmp_path / 'out.pth', tmp_path / 'net')
    report = inspect_checkpoint(done.checkpoint)
    assert report['norm layers'] == '2 LN; 1 GN; 1 BN; 1 LN/BN'
    assert report['norms elsewhere'] == '1 GN'
    assert report['selection'].splitlines()[0].split(maxsplit=1)[1] == '2 LN, 2 GN, 1 BN, 1 LN/BN'


def test_the_options_of_the_training(source, tmp_path):
    """A model that was trained with other settings than its config file has."""
    config = small_segmentor(correction=1)
    config.model.decode_head.channels = 4
    torch.save(decided_model(config).state_dict(), tmp_path / 'narrow.pth')
    arguments = str(source / 'net.py'), str(tmp_path / 'narrow.pth'), str(tmp_path / 'out.pth')
    with pytest.raises(CheckpointError, match='does not fit'):
        collapse_checkpoint(*arguments, images=[str(source / 'images')])
    options = {'model.decode_head.channels': 4}
    done = collapse_checkpoint(*arguments, images=[str(source / 'images')], options=options)
    assert Config.fromfile(done.config).model.decode_head.channels == 4


def test_native_changes_outputs_and_may(source, tmp_path):
    done = collapse(source, tmp_path / 'out.pth', native=True, count=1)
    assert done.comparison.images == 1
    assert 1e-6 < done.comparison.largest < 0.1
    assert Config.fromfile(done.config).model.native
    said = (
        r'out2.pth: not written: outputs of both models differ by \S+ of the largest, expected at'
    )
    with pytest.raises(InputError, match=said):
        collapse(source, tmp_path / 'out2.pth', native=True, tolerance=1e-7)
    assert sorted(os.listdir(tmp_path)) == ['out.pth', 'out.py']


def test_folding(source, tmp_path):
    save(tmp_path, 'net', normalizers=('LN', 'BN'))
    images = [str(source / 'images')]
    done = collapse(tmp_path, tmp_path / 'out.pth', fold=True, images=images)
    assert done.comparison.largest <= 1e-4
    assert done.folded
    config = Config.fromfile(done.config)
    assert [norm for _, norm in config.model.folded] == list(done.folded)
    assert all(config.model.choices[norm] == ('BN', 'BN') for norm in done.folded)
    state = torch.load(done.checkpoint, weights_only=True)['state_dict']
    for conv, norm in config.model.folded:
        assert f'{conv}.bias' in state
        assert f'{norm}.weight' not in state
    with pytest.raises(InputError, match=r'expected at most 0.0e\+00'):
        collapse(tmp_path, tmp_path / 'exact.pth', fold=True, tolerance=0.0, images=images)


def test_undecided_layers(source, tmp_path):
    saved = torch.load(source / 'net.pth', weights_only=False)
    for key in ('mean_fixed', 'mean_weight'):
        saved['state_dict'][f'backbone.layer1.0.sn2.{key}'].zero_()
    torch.save(saved, tmp_path / 'net.pth')
    (tmp_path / 'net.py').write_text((source / 'net.py').read_text())
    images = [str(source / 'images/a.png')]
    said = r'got 1 undecided of \d+ SSN layers, .*: backbone.layer1.0.sn2; --keep-undecided leaves'
    with pytest.raises(InputError, match=said):
        collapse(tmp_path, tmp_path / 'out.pth', images=images)
    assert not (tmp_path / 'out.pth').exists()
    done = collapse(tmp_path, tmp_path / 'out.pth', images=images, keep_undecided=True)
    assert done.undecided == ('backbone.layer1.0.sn2',)
    # Not once more, whatever is left undecided.
    with pytest.raises(InputError, match=r'config: .*out.py is that of a collapsed model'):
        collapse_checkpoint(str(done.config), str(done.checkpoint), str(tmp_path / 'twice.pth'))


def refused(kind: type[Exception], source: Path, out: Path, **settings) -> str:
    before = {path: path.read_bytes() for path in out.parent.glob('*') if path.is_file()}
    with pytest.raises(kind) as caught:
        collapse(source, out, **settings)
    after = {path: path.read_bytes() for path in out.parent.glob('*') if path.is_file()}
    assert after == before
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_places(source, tmp_path):
    (tmp_path / 'there.pth').write_text('a')
    (tmp_path / 'beside.py').write_text('b')
    (tmp_path / 'folder.py').mkdir()
    for out, said in (
        ('out', 'expected a name that ends in .pth'),
        ('there.pth', 'exists already'),
        ('beside.pth', f'{tmp_path / "beside.py"}: exists already'),
        ('folder.pth', 'folder.py: is a folder'),
        ('nowhere/out.pth', 'cannot be written: there is no folder'),
    ):
        assert said in refused(CheckpointError, source, tmp_path / out)
    for settings in ({}, {'overwrite': True}):
        said = refused(CheckpointError, source, source / 'net.pth', **settings)
        assert said == f'{source / "net.pth"}: would replace what it is made from'


def test_overwrite(source, tmp_path):
    for name in ('out.pth', 'out.py'):
        (tmp_path / name).write_text('old')
    done = collapse(source, tmp_path / 'out.pth', overwrite=True, count=1)
    assert Config.fromfile(done.config).model.type == 'CollapsedSSN'
    assert torch.load(done.checkpoint, weights_only=True)['state_dict']


def test_images(source, tmp_path, monkeypatch):
    out = tmp_path / 'out.pth'
    (tmp_path / 'broken.png').write_text('text')
    (tmp_path / 'empty').mkdir()
    for images, said in (
        (['nowhere'], 'images: no such file or folder: nowhere'),
        ([str(tmp_path / 'empty')], f'images: got no image in {tmp_path / "empty"}'),
        ([str(tmp_path / 'broken.png')], f'images: cannot read {tmp_path / "broken.png"}: '),
    ):
        assert said in refused(InputError, source, out, images=images)
    monkeypatch.chdir(tmp_path)  # where there is no demo data
    said = refused(InputError, source, out, images=[])
    assert said.startswith('test_dataloader.dataset: no such file or folder: data/demo/')
    assert said.endswith(', or name images by --images')


def test_other_architectures(source, tmp_path):
    state = torch.load(source / 'net.pth', weights_only=False)['state_dict']
    fewer = {key: value for key, value in state.items() if '.layer1.1.sn2.' not in key}
    other = copy.deepcopy(state)
    other['backbone.conv1.weight'] = torch.zeros(64, 3, 7, 7)
    (tmp_path / 'net.py').write_text((source / 'net.py').read_text())
    images = [str(source / 'images')]
    for weights, said in (
        (fewer, 'missing backbone.layer1.1.sn2.weight, '),
        (state | {'neck.conv.weight': torch.zeros(1)}, 'unexpected neck.conv.weight'),
        (other, 'size mismatch for backbone.conv1.weight'),
    ):
        torch.save(weights, tmp_path / 'net.pth')
        text = refused(CheckpointError, tmp_path, tmp_path / 'out.pth', images=images)
        assert f'net.pth: does not fit {tmp_path / "net.py"}: {said}' in text
    (tmp_path / 'net.pth').write_text('text')
    text = refused(CheckpointError, tmp_path, tmp_path / 'out.pth', images=images)
    assert 'truncated, or not a checkpoint' in text


def test_a_config_without_ssn(source, tmp_path):
    config = small_segmentor(type='BN')
    config.model.backbone.type = 'ResNet'
    (tmp_path / 'net.py').write_text(config.pretty_text)
    (tmp_path / 'net.pth').write_bytes((source / 'net.pth').read_bytes())
    text = refused(InputError, tmp_path, tmp_path / 'out.pth', images=[str(source / 'images')])
    assert text == f'config: the model of {tmp_path / "net.py"} has no SSN layers'
    (tmp_path / 'net.py').write_text('a = 1')
    text = refused(InputError, tmp_path, tmp_path / 'out.pth', images=[str(source / 'images')])
    assert text == f'config: {tmp_path / "net.py"} has no model'


def test_a_full_disk_leaves_neither_file(source, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        said = refused(CheckpointError, source, tmp_path / 'out.pth', count=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert said == f'{tmp_path / "out.pth"}: cannot be written: File too large'
    assert os.listdir(tmp_path) == []


def test_a_preprocessor_beside_the_model(source, tmp_path):
    """Where mmpretrain has it; the Runner moves it into the model."""
    config = small_segmentor(correction=1)
    config.data_preprocessor = config.model.pop('data_preprocessor')
    (tmp_path / 'net.py').write_text(config.pretty_text)
    settings = (str(source / 'net.pth'), str(tmp_path / 'out.pth'))
    done = collapse_checkpoint(str(tmp_path / 'net.py'), *settings, images=[str(source / 'images')])
    assert done.comparison.equal_labels == 2 * 40 * 50
    assert done.size == (128, 160)


def test_what_cannot_be_read_safely_is_not_written_again(source, tmp_path):
    loaded = torch.load(source / 'net.pth', weights_only=False)
    loaded['meta']['dataset_meta']['palette'] = np.zeros((2, 3))
    loaded['meta']['best'] = [np.float64(0.5)]
    torch.save(loaded, tmp_path / 'net.pth')
    collapse_checkpoint(
        str(source / 'net.py'),
        str(tmp_path / 'net.pth'),
        str(tmp_path / 'out.pth'),
        images=[str(source / 'images')],
    )
    meta = torch.load(tmp_path / 'out.pth', weights_only=True)['meta']
    assert meta['dataset_meta'] == {'classes': ('a', 'b')}
    assert 'best' not in meta


def test_a_config_that_is_no_text(source, tmp_path):
    config = small_segmentor(correction=1)
    text = config.pretty_text + "\nworst = float('inf')\n"
    (tmp_path / 'net.py').write_text(text)
    with pytest.raises(InputError, match=r'net.py cannot be written as text: NameError: .*inf'):
        collapse_checkpoint(
            str(tmp_path / 'net.py'),
            str(source / 'net.pth'),
            str(tmp_path / 'out.pth'),
            images=[str(source / 'images')],
        )
    assert os.listdir(tmp_path) == ['net.py']
