"""ONNX files of configs and checkpoints: what is written, and what is refused."""

import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from decided_models import decided_model, demo_config, small_segmentor
from mmengine.config import Config
from mmengine.registry import DefaultScope
from network_zoo import network
from since import EXPORT
from tool_runs import run_here

from ssn_plugin import SSN
from ssn_plugin.deploy.onnx_file import ExportError, relative_difference, run_onnx
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.export import Features, Logits, export_onnx

pytest.importorskip('onnxscript')
pytestmark = EXPORT


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())


def save(folder: Path, name: str, config: Config) -> torch.nn.Module:
    """A config and its checkpoint, in which one layer has not decided."""
    model = decided_model(config)
    undecided = next(layer for layer in model.modules() if isinstance(layer, SSN))
    undecided.reset_parameters()
    undecided.running_mean.normal_()
    (folder / f'{name}.py').write_text(config.pretty_text)
    torch.save({'state_dict': model.state_dict()}, folder / f'{name}.pth')
    return model


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    """A folder with two images and a small segmenter."""
    folder = tmp_path_factory.mktemp('source')
    (folder / 'images').mkdir()
    noise = np.random.default_rng(0)
    for name, size in (('a.png', (40, 50, 3)), ('b.jpg', (61, 45, 3))):
        cv2.imwrite(str(folder / 'images' / name), noise.integers(0, 255, size, np.uint8))
    save(folder, 'net', small_segmentor())
    return folder


def export(source: Path, out: Path, name: str = 'net', **settings):
    settings = {'images': [str(source / 'images')]} | settings
    return export_onnx(
        str(source / f'{name}.py'), str(source / f'{name}.pth'), str(out), **settings
    )


def test_what_is_written(source, tmp_path):
    import onnx

    out = tmp_path / 'out.onnx'
    done = export(source, out, opset=18)
    assert os.listdir(tmp_path) == ['out.onnx']
    assert (done.path, done.outputs) == (out, ['logits'])
    assert done.layers == {'decided': 5, 'undecided': 1}
    assert 0 < done.difference < 1e-5
    # Of another size than the recorded example, and a batch of two.
    assert [shape[0] for shape in done.shapes] == [1, 1, 2]
    assert len({shape[2:] for shape in done.shapes}) == 2
    notes = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert '"mean": [123.675' in notes['preprocessing']
    # As the model itself predicts, by its own code.
    model = save(tmp_path, 'again', small_segmentor())
    x = torch.randn(3, 3, 70, 90)
    metas = [dict(img_shape=(70, 90), pad_shape=(70, 90), ori_shape=(70, 90))] * 3
    with torch.no_grad():
        expected = model.encode_decode(x, metas)
    assert relative_difference(run_onnx(out, [x])[0], [expected]) < 1e-5


def test_a_network_that_holds_for_one_size(source, tmp_path):
    config = small_segmentor()
    head = config.model.decode_head
    del head.num_convs, head.concat_input
    head.update(type='PSPHead', pool_scales=(1, 3))
    save(tmp_path, 'net', config)
    (tmp_path / 'images').symlink_to(source / 'images')
    out = tmp_path / 'out.onnx'
    said = refused(ExportError, tmp_path, out)
    assert 'decode_head.psp_modules.1.0 pools to a grid of 3 x 3' in said
    assert said.endswith('--size HEIGHT WIDTH')
    done = export(tmp_path, out, size=(48, 80), batch=3)
    assert done.shapes == [(3, 3, 48, 80)] * 2
    assert 0 < done.difference < 1e-5


@pytest.mark.parametrize('name', ['DDRNet', 'PIDNet'])
def test_a_backbone_that_gives_its_head_one_map(name):
    model = network(name).eval()
    x = torch.randn(2, 3, 64, 64)
    metas = [dict(img_shape=(64, 64), pad_shape=(64, 64), ori_shape=(64, 64))] * 2
    with torch.no_grad():
        assert torch.equal(Logits(model).eval()(x)[0], model.encode_decode(x, metas))
        assert len(Features(model).eval()(x)) == 1


def test_above_the_tolerance_nothing_is_written(source, tmp_path):
    said = r'out.onnx: not written: ONNX Runtime differs .* by \S+ of the largest value, expected'
    with pytest.raises(ExportError, match=said):
        export(source, tmp_path / 'out.onnx', tolerance=0.0)
    assert not list(tmp_path.iterdir())


def refused(kind: type[Exception], source: Path, out: Path, **settings) -> str:
    with pytest.raises(kind) as caught:
        export(source, out, **settings)
    assert '\n' not in str(caught.value)
    assert not list(out.parent.glob('*.onnx*')) if out.parent.is_dir() else True
    return str(caught.value)


def test_what_is_refused_before_the_model_is_built(source, tmp_path, monkeypatch):
    out = tmp_path / 'out.onnx'
    assert refused(ExportError, source, out, opset=17).startswith('opset: got 17, expected 18 to ')
    said = refused(CheckpointError, source, tmp_path / 'out.pb')
    assert said == f'{tmp_path}/out.pb: expected a name that ends in .onnx'
    said = refused(CheckpointError, source, tmp_path / 'no/out.onnx')
    assert said.endswith(f'out.onnx: cannot be written: there is no folder {tmp_path}/no')
    assert 'no such file or folder: nowhere' in refused(InputError, source, out, images=['nowhere'])
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    said = refused(ExportError, source, out)
    assert said == 'onnxscript is missing: pip install onnx onnxruntime onnxscript'
    monkeypatch.undo()
    out.write_text('kept')
    with pytest.raises(CheckpointError, match='exists already; name another file or give --over'):
        export(source, out)
    assert out.read_text() == 'kept'


def test_checkpoints_and_models_that_do_not_fit(source, tmp_path):
    out = tmp_path / 'out.onnx'
    (tmp_path / 'images').symlink_to(source / 'images')
    config = small_segmentor()
    for name, change in (
        ('deeper', dict(backbone=dict(depth=34))),
        ('heads', dict(type='CascadeEncoderDecoder', num_stages=1)),
        ('bare', dict(_delete_=True, type='mmengine.ImgDataPreprocessor')),
    ):
        changed = config.copy()
        if '_delete_' in change:
            changed.model = dict(type='SSN', num_features=4)
        else:
            changed.merge_from_dict(dict(model=change))
        if name == 'heads':
            changed.model.decode_head = [changed.model.decode_head]
        (tmp_path / f'{name}.py').write_text(changed.pretty_text)
        with DefaultScope.overwrite_default_scope('mmseg'):
            from mmengine.registry import MODELS

            state = MODELS.build(changed.model).state_dict()
        torch.save({'state_dict': state}, tmp_path / f'{name}.pth')
    torch.save(torch.load(source / 'net.pth'), tmp_path / 'deeper.pth')
    said = refused(CheckpointError, tmp_path, out, name='deeper')
    assert 'deeper.pth: does not fit ' in said
    assert 'missing' in said
    said = refused(InputError, tmp_path, out, name='heads')
    assert 'CascadeEncoderDecoder' in said
    assert said.endswith('has 1 decode heads, expected one')
    assert 'config: the SSN of ' in refused(InputError, tmp_path, out, name='bare')


@pytest.mark.slow
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_demo_models_by_the_tool(scope, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save(tmp_path, 'net', demo_config(scope))
    code, out, err = run_here(
        'export_onnx.py', 'net.py', 'net.pth', 'out.onnx', '--images', str(source / 'images')
    )
    assert code == 0, err
    assert sorted(os.listdir()) == ['net.pth', 'net.py', 'out.onnx']
    names = ['feat0', 'feat1', 'feat2', 'feat3'] if scope == 'mmdet' else ['logits']
    assert f'outputs: {", ".join(names)}\n' in out
    assert ' 1 as mixtures\n' in out
    x = torch.randn(3, 3, 96, 160)
    with torch.no_grad():
        if scope == 'mmdet':
            expected = model.extract_feat(x)
        else:
            expected = [model.encode_decode(x, [dict(img_shape=(96, 160))] * 3)]
    assert relative_difference(run_onnx(Path('out.onnx'), [x])[0], expected) < 1e-4
