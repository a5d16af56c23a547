"""Mask R-CNN in two processes by the scripts that users have: both choose the same, always."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo_data import make_demo_dataset

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py'
ITERATIONS = 8
GPUS = torch.cuda.device_count()


def run(
    *arguments: object, cwd: Path, seconds: float = 120, gpus: bool = GPUS > 1
) -> subprocess.CompletedProcess:
    """A script under a time limit, at whose end no process of it is left.

    Two processes take two GPUs and nccl where there are two, else the CPU and gloo.
    """
    environment = {
        **os.environ,
        **({} if gpus else {'CUDA_VISIBLE_DEVICES': ''}),
        'PYTHON': sys.executable,
        'PYTHONPATH': os.pathsep.join(
            [str(ROOT / 'tests/support'), os.environ.get('PYTHONPATH', '')]
        ),
        'OMP_NUM_THREADS': '1',
    }
    process = subprocess.Popen(
        [*map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun takes its processes with it
        try:
            output, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        pytest.fail(f'no end after {seconds} s:\n{output[-3000:]}')
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def train(folder: Path, processes: int, *options: str, gpus: bool = GPUS > 1) -> list[list[dict]]:
    """What each process of a training by ``dist_train.sh`` noted; the rest is in the folder."""
    make_demo_dataset(folder / 'data/demo', num_train=6, num_val=3)
    text = CONFIG.read_text().replace("'../_base_", f"'{CONFIG.parents[1]}/_base_")
    (folder / 'own.py').write_text(
        f'{text}\n'
        # the backbone keeps SSN
        "heads = model['roi_head']\n"
        "for part in (model['neck'], heads['bbox_head'], heads['mask_head']):\n"
        "    part['norm_cfg'] = dict(type='SyncSSN')\n"
        "custom_imports = dict(imports=['ssn_plugin', 'selection_log'])\n"
        "custom_hooks = [dict(type='SSNRadiusHook', end=0.9),\n"
        f"    dict(type='SSNRatioHook'), dict(type='SelectionLog', folder={str(folder)!r})]\n"
    )
    result = run(
        ROOT / 'tools/dist_train.sh',
        'own.py',
        processes,
        '--work-dir',
        'trained',
        *options,
        '--cfg-options',
        f'train_cfg.max_iters={ITERATIONS}',
        f'train_cfg.val_interval={ITERATIONS}',
        'train_dataloader.batch_size=2',
        'val_dataloader.batch_size=1',
        # an untrained classifier is sure of nothing
        'model.test_cfg.rcnn.score_thr=0.0',
        # so that some ratios are one-hot before the radius makes them so
        'optim_wrapper.paramwise_cfg.ssn_lr_mult=2000.0',
        cwd=folder,
        gpus=gpus,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    logs = [(folder / f'rank{rank}.jsonl').read_text().splitlines() for rank in range(processes)]
    return [[json.loads(line) for line in log] for log in logs]


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, list[list[dict]]]:
    """The folder of a training in two processes, and what each noted."""
    folder = tmp_path_factory.mktemp('run')
    return folder, train(folder, 2)


@pytest.mark.slow
def test_processes_choose_the_same_at_the_same_iteration(trained):
    _, (first, second) = trained
    assert [record['iteration'] for record in first] == list(range(ITERATIONS))
    for ours, theirs in zip(first, second, strict=True):
        for key in ('iteration', 'selected', 'fixed', 'control', 'parameters', 'unused'):
            assert ours[key] == theirs[key], (key, ours['iteration'])
    assert not first[0]['unused']


@pytest.mark.slow
def test_that_agreement_was_not_for_free(trained):
    """Images differ, and the run goes from no decided layer over some to all."""
    _, (first, second) = trained
    assert all(a['images'] != b['images'] for a, b in zip(first, second, strict=True))
    decided = [sum(sum(pair) for pair in record['fixed'].values()) for record in first]
    total = 2 * len(first[0]['fixed'])
    assert decided[0] == 0
    assert any(0 < count < total for count in decided)
    assert decided[-2:] == [total] * 2
    assert len({str(pair) for pair in first[-1]['selected'].values()}) > 1
    assert len({record['parameters'] for record in first}) == ITERATIONS


@pytest.mark.slow
def test_running_statistics_differ_unless_they_are_synchronised(trained):
    _, (first, second) = trained
    for ours, theirs in zip(first, second, strict=True):
        assert ours['buffers']['SSN'] != theirs['buffers']['SSN']
        assert ours['buffers']['SyncSSN'] == theirs['buffers']['SyncSSN']


@pytest.mark.slow
def test_the_test_script_evaluates_in_two_processes(trained):
    folder, _ = trained
    checkpoint = f'trained/iter_{ITERATIONS}.pth'
    options = ['--work-dir', 'tested', '--cfg-options', 'test_dataloader.batch_size=1']
    script = ROOT / 'tools/dist_test.sh'
    result = run(script, 'own.py', checkpoint, 2, *options, cwd=folder)
    assert result.returncode == 0, result.stdout[-4000:]
    (path,) = (folder / 'tested').glob('*/*.json')
    tested = json.loads(path.read_text())
    (path,) = (folder / 'trained').glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    (validated,) = [record for record in records if 'coco/bbox_mAP' in record]
    for name, value in validated.items():
        if name.startswith('coco/'):
            assert tested[name] == value, name


@pytest.mark.slow
@pytest.mark.skipif(GPUS == 0, reason='needs a GPU')
def test_mixed_precision_over_nccl(tmp_path):
    """With one GPU it is a process alone, where SyncSSN has nobody to talk to."""
    from mmcv.ops import get_compiling_cuda_version

    if get_compiling_cuda_version() == 'not available':
        pytest.skip('mmcv has no operators for GPUs')
    logs = train(tmp_path, min(GPUS, 2), '--amp', gpus=True)
    for log in logs:
        assert all(sum(pair) == 2 for pair in log[-1]['fixed'].values())
    if GPUS > 1:
        ours, theirs = ([record['parameters'] for record in log] for log in logs)
        assert ours == theirs
    checkpoint = torch.load(tmp_path / f'trained/iter_{ITERATIONS}.pth', weights_only=False)
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())
    assert 'loss_scaler' in checkpoint['optimizer']


@pytest.mark.parametrize(
    ('arguments', 'code', 'said'),
    [
        (['dist_train.sh', 'config.py'], 2, "got NPROC '', expected a positive number"),
        (['dist_train.sh', 'config.py', 'two'], 2, "got NPROC 'two', expected a positive number"),
        (['dist_test.sh', 'config.py', 'a.pth', '0'], 2, "got NPROC '0', expected a positive"),
    ],
)
def test_bad_command_lines(arguments, code, said, tmp_path):
    script, *rest = arguments
    result = run(ROOT / 'tools' / script, *rest, cwd=tmp_path)
    assert result.returncode == code
    assert said in result.stdout
    assert 'usage: tools/dist_' in result.stdout


def test_errors_of_the_processes_are_one_line_each(tmp_path):
    result = run(ROOT / 'tools/dist_train.sh', 'nothing.py', 2, cwd=tmp_path)
    assert result.returncode == 1
    assert 'train.py: config: no such file: nothing.py' in result.stdout
    assert 'Traceback' not in result.stdout
