"""The benchmarks: their shapes are those of the configs, and each script runs."""

import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from decided_models import decided_model, small_segmentor
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from since import EXPORT, require_kernels
from torch import nn

from ssn_plugin import SSN
from ssn_plugin.jobs.export import export_onnx

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / 'benchmarks'


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the folder, whose scripts import one another by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], '__file__', '')):
            del sys.modules[name]


def inputs_of(model, *runs) -> Counter:
    """How many SSN layers of a model on the meta device meet which input size."""
    seen = {}

    def note(name):
        def hook(module, args):
            seen.setdefault(name, tuple(args[0].shape))

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, SSN)}
    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    for run in runs:
        run(model)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles)
    return Counter(seen.values())


def built(config: str, scope: str):
    cfg = Config.fromfile(ROOT / 'configs' / config)
    cfg.model.backbone.init_cfg = None
    init_default_scope(scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def table(shapes) -> Counter:
    counts = Counter()
    for shape in shapes:
        counts[shape.size] += shape.count
    return counts


def test_detection_shapes_are_those_of_the_config(benchmark):
    pytest.importorskip('mmdet')
    model = built('coco/mask-rcnn_r50_fpn_ssn-all_2x_coco.py', 'mmdet')
    image = torch.empty(2, 3, 800, 1344, device='meta')
    rois = model.train_cfg.rcnn.sampler
    boxes, masks = 2 * rois.num, 2 * int(rois.num * rois.pos_fraction)
    found = inputs_of(
        model,
        lambda model: model.extract_feat(image),
        lambda model: model.roi_head.bbox_head(torch.empty(boxes, 256, 7, 7, device='meta')),
        lambda model: model.roi_head.mask_head(torch.empty(masks, 256, 14, 14, device='meta')),
    )
    assert found == table(benchmark('shapes').MASK_RCNN)


def test_segmentation_shapes_are_those_of_the_config(benchmark):
    pytest.importorskip('mmseg')
    model = built(
        'cityscapes/deeplabv3plus_r50-d8_ssn-all_4xb2-80k_cityscapes-512x1024.py', 'mmseg'
    )

    def run(model):
        features = model.extract_feat(torch.empty(2, 3, 512, 1024, device='meta'))
        model.decode_head(features)
        model.auxiliary_head(features)

    assert inputs_of(model, run) == table(benchmark('shapes').DEEPLAB)


def test_classification_shapes_are_those_of_the_backbone(benchmark):
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(dict(type='SSNResNet', depth=50))
    found = inputs_of(model, lambda model: model(torch.empty(32, 3, 224, 224, device='meta')))
    assert found == table(benchmark('shapes').IMAGENET)


@pytest.fixture
def run(benchmark, monkeypatch, tmp_path):
    """Runs a script with arguments, after one test of parity; returns the rows that it writes."""

    def run(name, *arguments):
        script = benchmark(name)
        monkeypatch.setattr(benchmark('records'), 'RESULTS', tmp_path)
        monkeypatch.setattr(benchmark('parity'), 'TESTS', ['tests/test_public_api.py'])
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *arguments])
        script.main()
        (path,) = tmp_path.iterdir()
        return list(csv.DictReader(path.read_text().splitlines()))

    return run


def test_layer(run, capsys):
    rows = run('layer', '--only', 'image pool', '--rounds', '3')
    medians = {row['layer']: float(row['ratio']) for row in rows if row['mode'] == 'both'}
    assert medians.pop('BatchNorm2d') == 1
    assert {'SSN undecided', 'SSN all BN', 'SN', 'straightforward SSN'} <= set(medians)
    assert 'InstanceNorm2d' not in medians  # rows of one element
    assert all(float(row['peak_mb']) > 0 and row['commit'] for row in rows)
    shown = capsys.readouterr().out
    assert f'{medians["SSN undecided"]:.3f}' in shown
    assert 'geometric mean' in shown


def test_layer_without_a_shape(run):
    with pytest.raises(SystemExit, match=r"layer.py: --only: got 'nowhere', expected a part of"):
        run('layer', '--only', 'nowhere')


def test_sparsestmax(run, benchmark, monkeypatch):
    benchmark('sparsestmax')
    monkeypatch.setattr(sys.modules['sparsestmax'], 'SIZES', ((2, 3),))
    rows = run('sparsestmax', '--rounds', '3')
    assert {row['function'] for row in rows} == {'softmax', 'sparsestmax', 'recursion of the paper'}
    assert {row['ratio'] for row in rows if row['function'] == 'softmax'} == {'1.00'}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('network', 'norm'), [('mask-rcnn', 'SSN decided'), ('deeplabv3plus', 'BN')]
)
def test_training_step(benchmark, network, norm):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    script, cpu = benchmark('training_step'), torch.device('cpu')
    model, optim_wrapper = script.built(network, norm, 4, cpu)
    layers = [module for module in model.modules() if isinstance(module, SSN)]
    assert all(None not in layer.selected for layer in layers)
    assert bool(layers) == (norm == 'SSN decided')
    before = model.backbone.conv1.weight.clone()
    figures = script.run_once(model, optim_wrapper, script.batch(network, 64, 96, 4), cpu)
    assert figures['step'] > 0
    assert not torch.equal(model.backbone.conv1.weight, before)


@pytest.mark.slow
def test_deployment(run, benchmark):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    script = benchmark('deployment')
    size = ('--height', '32', '--width', '64', '--rounds', '3')
    selections = ('--selections', 'all BN', 'all LN')
    rows = run('deployment', '--networks', 'deeplabv3plus', *selections, *size)
    forms = [(row['selection'], row['form']) for row in rows]
    assert len(set(forms)) == len(forms) == 8
    # All of them are compared with this one. Of LN alone there is nothing to fold.
    assert {row['ratio'] for row in rows if row['form'] == script.BASELINE} == {'1.0000'}
    assert ('all LN', 'collapsed, folded') not in forms


def test_deployment_selections(benchmark):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    script = benchmark('deployment')
    model = nn.Sequential(*(SSN(4) for _ in range(9)))
    chosen = {name: [m.selected for m in script.decided(model, name)] for name in script.SELECTIONS}
    assert set(chosen['all LN']) == {('LN', 'LN')}
    assert Counter(chosen['thirds']) == {(name, name): 3 for name in ('IN', 'LN', 'BN')}
    apart = chosen[script.APART]
    assert any(mean != var for mean, var in apart)
    for choices in zip(*apart, strict=True):
        assert Counter(choices) == {'IN': 3, 'LN': 3, 'BN': 3}
    assert all(None in layer.selected for layer in model)  # copies were decided


def test_nothing_is_timed_that_computes_something_else(benchmark, monkeypatch):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    script = benchmark('deployment')

    def wrong(model):
        nn.init.zeros_(model.backbone.conv1.weight)
        return model

    monkeypatch.setattr(script, 'fuse_conv_bn', wrong)
    with pytest.raises(SystemExit, match=r'mask-rcnn: outputs differ by .* nothing was measured'):
        script.variants('mask-rcnn', torch.randn(1, 3, 64, 64), [], torch.device('cpu'))


def test_no_figure_where_parity_fails(benchmark, monkeypatch, tmp_path):
    parity = benchmark('parity')
    wrong = tmp_path / 'test_wrong.py'
    wrong.write_text('def test_wrong():\n    assert 1 + 1 == 3\n')
    monkeypatch.setattr(parity, 'TESTS', [str(wrong)])
    with pytest.raises(SystemExit, match='nothing was measured'):
        parity.require_parity(torch.device('cpu'))


def test_straightforward_layer_computes_the_same(benchmark):
    layer = benchmark('layer').ssn(6).double()
    radius = layer.radius.item()  # rounded to float32
    plain = benchmark('straightforward').StraightforwardSSN(6, radius).double()
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    dy = torch.randn_like(x)
    found = []
    for module in (plain, layer):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(dy)
        gradients = [leaf.grad, module.mean_weight.grad, module.var_weight.grad]
        gradients += [module.weight.grad.flatten(), module.bias.grad.flatten()]
        found.append([y.detach(), *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_tables_of_the_readme_are_those_of_the_results(benchmark):
    tables = benchmark('tables')
    text = tables.README.read_text()
    assert tables.with_tables(text) == text
    assert tables.tables().count('| geometric mean |') >= 1


def test_traffic_in_the_readme_is_that_of_the_launches(benchmark):
    traffic = benchmark('traffic')
    text = traffic.README.read_text()
    assert traffic.with_table(text) == text
    assert text.count('| mask-rcnn ') == 15
    assert traffic.table().count('\n') == 41  # two lines of head, 40 inputs


def test_host_cost():
    pytest.importorskip('triton.backends')
    if not shutil.which('cc'):
        pytest.skip('it needs a C compiler')
    result = subprocess.run(
        [sys.executable, FOLDER / 'host_cost.py', '--rounds', '3'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert 'launches of the SSN, forward and backward: 4' in result.stdout
    *_, last = result.stdout.splitlines()
    # Far from a figure, but a launch that searches for its kernel again would show.
    assert float(re.fullmatch(r'host cost: ([\d.]+) x BatchNorm2d', last)[1]) < 4


@pytest.mark.slow
@EXPORT
def test_quantization(benchmark, monkeypatch, tmp_path, capsys):
    """Labels are what float32 says, so its mIoU is 100 % and that of int8 is what it keeps."""
    for name in ('mmseg', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(name)
    script = benchmark('quantization')
    config = small_segmentor()
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.update(
            data_root=str(tmp_path), data_prefix=dict(img_path='images', seg_map_path='labels'),
            img_suffix='.png', seg_map_suffix='.png',
        )  # fmt: skip
    model = decided_model(config)
    nn.init.normal_(model.decode_head.conv_seg.weight)  # so that it sees several classes
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'net.pth')
    (tmp_path / 'net.py').write_text(config.pretty_text)
    (tmp_path / 'labels').mkdir()
    (tmp_path / 'images').mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        image = cv2.resize(random.integers(0, 255, (8, 10, 3), np.uint8), (160, 128))
        cv2.imwrite(str(tmp_path / f'images/{number}.png'), image)
        cv2.imwrite(str(tmp_path / f'labels/{number}.png'), np.zeros((128, 160), np.uint8))
    network = str(tmp_path / 'net.onnx')
    export_onnx(*(str(tmp_path / name) for name in ('net.py', 'net.pth')), network)
    for number, (x, _) in enumerate(script.samples(config, config.val_dataloader, None)):
        (logits,) = script.session(network).run(None, {'input': x})
        labels = logits[0].argmax(0).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f'labels/{number}.png'), labels)
    assert len(np.unique(labels)) > 1
    monkeypatch.setattr(sys, 'argv', ['quantization.py', str(tmp_path / 'net.py'), network])
    script.main()
    found = re.findall(
        r'(.*): mIoU ([\d.]+) %, .* ms, to float32 ([\d.]+)', capsys.readouterr().out
    )
    kept = {name: float(miou) for name, miou, _ in found}
    assert kept.pop('float32') == 100
    assert len(kept) == 4
    assert all(60 < miou < 100 for miou in kept.values())


@pytest.mark.parametrize('device', ['', 'NVIDIA H200'])
def test_the_gpu_script_loses_no_part_to_another(device, tmp_path):
    # In the place of Python something that fails in two parts, and waits for none.
    python = tmp_path / 'python'
    python.write_text(
        '#!/bin/sh\n'
        'echo "$*" >> "$0.log"\n'
        'case "$*" in *smoke*|*layers*) exit 3;; *tables*) echo tables at last;;\n'
        f'-) echo {device};; *collect-only*) seq -f "test_gpu.py::%g" 9;; esac\n'
    )
    python.chmod(0o755)
    mine = tmp_path / 'out' / 'mine.csv'
    mine.parent.mkdir()
    mine.write_text('kept')
    result = subprocess.run(
        ['bash', FOLDER / 'run_gpu.sh', 'out'],
        env={**os.environ, 'PYTHON': str(python)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    called = (tmp_path / 'python.log').read_text()
    for part in ('smoke', 'warm', 'layers', 'step', 'names', 'host_cost', 'tables'):
        assert part in called
    tested = re.findall(r'::(\d)', called)
    assert sorted(tested) == (list('123456789') if device else [])
    *_, first, second, last = result.stdout.splitlines()
    assert (first, second) == ('FAILED: smoke', 'FAILED: layers')
    assert str(tmp_path / 'out') in last
    assert (tmp_path / 'out' / 'tables.txt').read_text() == 'tables at last\n'
    assert mine.read_text() == 'kept'


@pytest.mark.slow
def test_the_gpu_script_runs_dry(tmp_path):
    # Where there is no GPU: all of its parts on tiny inputs, the kernels interpreted.
    require_kernels()
    if torch.cuda.is_available():
        pytest.skip('a GPU is there: it would be measured')
    result = subprocess.run(
        ['bash', FOLDER / 'run_gpu.sh', tmp_path / 'out'],
        env={**os.environ, 'PYTHON': sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert 'smoke: every layer is right' in result.stdout
    assert ('step: not measured' in result.stdout) != (tmp_path / 'out' / 'step.csv').is_file()
    *_, last = result.stdout.strip().splitlines()
    assert str(tmp_path / 'out') in last
    with open(tmp_path / 'out' / 'layers.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {'BatchNorm2d', 'SSN undecided'} <= {row['layer'] for row in rows}
    assert all(float(row['device_us']) > 0 for row in rows)
