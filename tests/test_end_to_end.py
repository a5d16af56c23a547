"""Real runs of the demo configs, cut short: train, resume, test, inference, all scripts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tool_runs import run_here

from demo_data import make_demo_dataset

ROOT = Path(__file__).parents[1]
CONFIGS = {
    'mmdet': ROOT / 'configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py',
    'mmseg': ROOT / 'configs/demo/deeplabv3plus_r18-d8_ssn-all_demo.py',
}
METRICS = {'mmdet': ('coco/bbox_mAP', 'coco/segm_mAP'), 'mmseg': ('mIoU', 'aAcc')}
SHORT = [
    'train_cfg.max_iters=6',
    'train_cfg.val_interval=6',
    'default_hooks.checkpoint.interval=3',
    'default_hooks.checkpoint.max_keep_ckpts=-1',
    'default_hooks.logger.interval=1',
    'train_dataloader.batch_size=2',
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A working folder with a few demo scenes where the demo configs look for them."""
    path = tmp_path_factory.mktemp('run')
    make_demo_dataset(path / 'data/demo', num_train=6, num_val=3)
    return path


def run(folder: Path, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': ''},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def scalars(work_dir: Path) -> list[dict]:
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module', params=['mmdet', 'mmseg'])
def trained(request, folder) -> tuple[str, Path]:
    """A short run of our train script."""
    scope = request.param
    work_dir = folder / scope
    run(
        folder,
        ROOT / 'tools/train.py',
        CONFIGS[scope],
        '--work-dir',
        work_dir,
        '--cfg-options',
        *SHORT,
    )
    return scope, work_dir


def test_radius_and_decisions_are_logged(trained):
    records = [record for record in scalars(trained[1]) if 'ssn_radius' in record]
    assert records[-1]['ssn_radius'] == 1.0
    assert records[-1]['ssn_decided'] > 20


def test_every_layer_is_frozen_in_the_checkpoint(trained):
    saved = torch.load(trained[1] / 'iter_6.pth', map_location='cpu', weights_only=False)
    weights = saved['state_dict']
    fixed = [value for key, value in weights.items() if key.endswith('_fixed')]
    assert fixed
    assert all(int(value) == 1 for value in fixed)
    control = [
        value for key, value in weights.items() if key.endswith(('mean_weight', 'var_weight'))
    ]
    assert all(sorted(value.tolist()) == [0, 0, 1] for value in control)


def test_the_test_script_repeats_the_last_validation(trained, folder, tmp_path):
    scope, work_dir = trained
    validated = [record for record in scalars(work_dir) if METRICS[scope][0] in record][-1]
    run(
        folder,
        ROOT / 'tools/test.py',
        CONFIGS[scope],
        work_dir / 'iter_6.pth',
        '--work-dir',
        tmp_path,
    )
    (path,) = tmp_path.glob('*/*.json')
    tested = json.loads(path.read_text())
    for name in METRICS[scope]:
        assert tested[name] == validated[name]


def test_stock_script_runs_our_config(trained, folder, tmp_path):
    scope, _ = trained
    module = __import__(scope)
    script = Path(module.__file__).parent / '.mim/tools/train.py'
    run(
        folder,
        script,
        CONFIGS[scope],
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *SHORT,
        'train_cfg.max_iters=2',
    )
    assert (tmp_path / 'iter_2.pth').is_file()


def test_resumed_run_goes_on_at_the_exact_radius(trained, folder, tmp_path):
    scope, work_dir = trained
    (tmp_path / 'iter_3.pth').write_bytes((work_dir / 'iter_3.pth').read_bytes())
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_3.pth'))
    arguments = ['--work-dir', tmp_path, '--resume', '--cfg-options', *SHORT]
    log = run(folder, ROOT / 'tools/train.py', CONFIGS[scope], *arguments)
    assert re.search(r'resumed epoch: \d+, iter: 3', log)
    final = [torch.load(d / 'iter_6.pth', weights_only=False) for d in (work_dir, tmp_path)]
    radii = [
        {key: float(value) for key, value in saved['state_dict'].items() if key.endswith('radius')}
        for saved in final
    ]
    assert radii[0] == radii[1]
    assert set(radii[0].values()) == {1.0}


def test_inference_interfaces(trained, folder, monkeypatch):
    # as README.md says for the original mmengine
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    scope, work_dir = trained
    checkpoint = str(work_dir / 'iter_6.pth')
    if scope == 'mmdet':
        from mmdet.apis import DetInferencer

        picture = next((folder / 'data/demo/coco/val2017').glob('*.jpg'))
        inferencer = DetInferencer(str(CONFIGS[scope]), checkpoint, device='cpu')
        found = inferencer(str(picture), return_datasamples=True)['predictions'][0]
        assert found.pred_instances.masks.shape[1:] == (128, 160)
    else:
        from mmseg.apis import inference_model, init_model

        picture = next((folder / 'data/demo/cityscapes/leftImg8bit/val').rglob('*.png'))
        model = init_model(str(CONFIGS[scope]), checkpoint, device='cpu')
        found = inference_model(model, str(picture))
        assert found.pred_sem_seg.data.shape == (1, 128, 160)
        assert np.isfinite(found.seg_logits.data.numpy()).all()


@pytest.fixture(scope='module')
def collapsed(trained, folder) -> tuple[Path, Path]:
    """Config and checkpoint that tools/collapse.py writes."""
    scope, work_dir = trained
    out = folder / f'collapsed-{scope}' / 'model.pth'
    out.parent.mkdir()
    arguments = [CONFIGS[scope], work_dir / 'iter_6.pth', out, '--num-images', '2']
    before = Path.cwd()
    os.chdir(folder)
    try:
        code, log, errors = run_here('collapse.py', *map(str, arguments))
    finally:
        os.chdir(before)
    assert code == 0, errors
    assert re.search(r'outputs on 2 images: largest difference \d\.\de[-+]\d\d, mean', log)
    assert re.search(r'(\d+) of \1 pixels of equal class|(\d+) of \2 boxes matched|no box has', log)
    return out.with_suffix('.py'), out


def test_the_collapsed_model_tests_the_same(trained, collapsed, folder, tmp_path):
    """By the framework's own script."""
    scope, work_dir = trained
    validated = [record for record in scalars(work_dir) if METRICS[scope][0] in record][-1]
    stock = Path(__import__(scope).__file__).parent / '.mim/tools/test.py'
    run(folder, stock, *collapsed, '--work-dir', tmp_path)
    (path,) = tmp_path.glob('*/*.json')
    tested = json.loads(path.read_text())
    for name in METRICS[scope]:
        assert tested[name] == validated[name]


def test_inference_interfaces_of_the_collapsed_model(trained, collapsed, folder, monkeypatch):
    monkeypatch.delenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', raising=False)
    scope, work_dir = trained
    pairs = [(CONFIGS[scope], work_dir / 'iter_6.pth'), collapsed]
    if scope == 'mmdet':
        from mmdet.apis import DetInferencer, inference_detector, init_detector

        picture = str(next((folder / 'data/demo/coco/val2017').glob('*.jpg')))
        found = [
            inference_detector(init_detector(str(config), str(weights), device='cpu'), picture)
            for config, weights in pairs
        ]
        alone = DetInferencer(weights=str(collapsed[1]), device='cpu', show_progress=False)
        found += alone(picture, return_datasamples=True)['predictions']
        first, *others = (each.pred_instances for each in found)
        assert len(first)
        for other in others:
            torch.testing.assert_close(other.bboxes, first.bboxes, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(other.scores, first.scores, rtol=1e-4, atol=1e-5)
            assert torch.equal(other.labels, first.labels)
    else:
        from mmseg.apis import MMSegInferencer, inference_model, init_model

        picture = str(next((folder / 'data/demo/cityscapes/leftImg8bit/val').rglob('*.png')))
        first, second = (
            inference_model(init_model(str(config), str(weights), device='cpu'), picture)
            for config, weights in pairs
        )
        torch.testing.assert_close(
            second.seg_logits.data, first.seg_logits.data, rtol=1e-4, atol=1e-5
        )
        inferencer = MMSegInferencer(*map(str, collapsed), device='cpu')
        labels = inferencer(picture, show=False, return_datasamples=True)
        assert torch.equal(labels.pred_sem_seg.data, second.pred_sem_seg.data)


def test_resume_reads_the_latest_checkpoint_first(folder, tmp_path):
    """Before mmengine, which would unpickle what is refused."""
    (tmp_path / 'iter_3.pth').write_text('<html>404</html>')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_3.pth'))
    command = [ROOT / 'tools/train.py', CONFIGS['mmdet'], '--work-dir', tmp_path, '--resume']
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 1
    said = f'train.py: resume: {tmp_path}/iter_3.pth: not a checkpoint of torch'
    assert result.stderr.splitlines()[-1] == said
    assert 'Traceback' not in result.stderr
