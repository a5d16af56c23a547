"""The commands of the pages on own data and on comparing norms run, at tiny size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from demo_data import make_demo_dataset

ROOT = Path(__file__).parents[1]
SHORT = (
    ' train_dataloader.num_workers=0 train_dataloader.persistent_workers=False'
    ' val_dataloader.num_workers=0 val_dataloader.persistent_workers=False'
    ' model.backbone.init_cfg=None model.backbone.depth=18'
)
# Options that make each network small, and the key of its score.
SEGMENTATION = (
    ' model.decode_head.in_channels=512 model.decode_head.c1_in_channels=64'
    ' model.auxiliary_head.in_channels=256'
)
DETECTION = ' model.neck.in_channels="[64,128,256,512]"'

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('_needs')]


@pytest.fixture
def _needs():
    for package in ('skimage', 'mmdet', 'mmseg'):
        pytest.importorskip(package)


@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> Path:
    """What a reader's clone has: configs, tools, data, and the configs that the pages show."""
    path = tmp_path_factory.mktemp('clone')
    for name in ('configs', 'tools'):
        (path / name).symlink_to(ROOT / name)
    make_demo_dataset(path / 'data/mine', num_train=4, num_val=2, size=96)
    (path / 'my_config.py').write_text(config_on('your-data', 'configs/coco'))
    (path / 'my_seg_config.py').write_text(config_on('your-seg-data', 'configs/_base_'))
    return path


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / f'docs/{page}.md').read_text()
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def config_on(page: str, part: str) -> str:
    (found,) = (text for text in blocks(page, 'python') if '_base_' in text and part in text)
    return found


def options_of_the_try(page: str) -> str:
    """What a page adds to its command for a short run on a CPU, shorter still."""
    (command,) = (text for text in blocks(page, 'bash') if 'init_cfg=None randomness' in text)
    options = command.partition('--cfg-options')[2].replace('\\\n', ' ').strip()
    options = re.sub(
        r'(max_epochs|val_interval|checkpoint.interval|logger.interval)=\d+', r'\1=1', options
    )
    return re.sub(r'(max_iters|scheduler.0.end)=\d+', r'\1=1', options)


def run(command: str, folder: Path) -> str:
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    result = subprocess.run(
        ['bash', '-ec', command],
        cwd=folder,
        env=os.environ | dict(PATH=path),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f'{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}'
    return result.stdout


def compare(clone: Path, base: str, options: str, norms: list[str], folder: str) -> list[float]:
    """Run the page's commands for one seed and some norms; the scores that its last one prints."""
    (config,) = (text for text in blocks('does-it-help', 'python') if f"'{base}'" in text)
    (clone / 'compare.py').write_text(config)
    loops, reading = (text for text in blocks('does-it-help', 'bash'))
    loops = loops.replace('work_dirs/compare', folder).replace('0 1 2', '0')
    loops = loops.replace('randomness.seed=$seed', f'randomness.seed=$seed {options}')
    lines = loops.splitlines()
    assert [re.search(r'NORM=(\w+)', line)[1] for line in lines] == ['BN', 'GN', 'SSN']
    for line in lines:
        if re.search(r'NORM=(\w+)', line)[1] in norms:
            run(line, clone)
    shown = run(reading.replace('work_dirs/compare', folder), clone)
    return [json.loads(line) for line in shown.splitlines() if line.startswith('{')]


def test_norms_on_own_segmentation_data(clone):
    options = options_of_the_try('your-seg-data') + SHORT + SEGMENTATION
    scores = compare(clone, 'my_seg_config.py', options, ['GN', 'SSN'], 'work_dirs/seg')
    assert [0 <= score['mIoU'] <= 100 for score in scores] == [True] * 2
    log = next((clone / 'work_dirs/seg').glob('SSN-0/*/*.log')).read_text()
    assert 'images per process: 2' in log


def test_norms_on_own_detection_data(clone):
    options = options_of_the_try('your-data') + SHORT + DETECTION
    scores = compare(clone, 'my_config.py', options, ['SSN'], 'work_dirs/det')
    assert ['coco/bbox_mAP' in score for score in scores] == [True]


def test_own_segmentation_data_by_its_page(clone):
    options = options_of_the_try('your-seg-data') + SHORT + SEGMENTATION
    run(f'python tools/train.py my_seg_config.py --work-dir own --cfg-options {options}', clone)
    run(
        'python tools/test.py my_seg_config.py own/iter_1.pth --work-dir tested '
        f'--show-dir pictures --cfg-options {options}',
        clone,
    )
    assert len(list((clone / 'pictures').rglob('*.png'))) == 2
    decided = run('python tools/analyze_selection.py own', clone)
    assert 'image_pool.1.sn' in decided
