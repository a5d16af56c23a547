"""The demos as a user runs them: they learn, every layer becomes one normalizer, pictures exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer
from PIL import Image

from demo_data import CLASSES, PALETTE, SEG_CLASSES, SEG_PALETTE
from ssn_plugin.errors import InputError
from ssn_plugin.jobs.configs import load_config
from ssn_plugin.jobs.demo import TASKS, run_demo

ROOT = Path(__file__).parents[1]


def demo(task: str, work_dir: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / 'tools/demo.py', task, '--work-dir', work_dir],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.demo
@pytest.mark.parametrize(
    ('task', 'least'),
    [('det', {'box AP50': 0.5, 'mask AP50': 0.5}), ('seg', {'mIoU (in %)': 50})],
)
def test_demo_learns(task, least, tmp_path):
    result = demo(task, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for name, value in least.items():
        assert float(re.search(rf'{re.escape(name)}: ([\d.]+)', result.stdout)[1]) >= value
    decided, layers = re.search(r'one normalizer: (\d+) of (\d+)', result.stdout).groups()
    assert decided == layers
    pictures = [
        Path(line.strip()) for line in result.stdout.split('\nPictures:\n')[1].split('\n')[:-1]
    ]
    assert len(pictures) == 2
    for picture in pictures:
        with Image.open(picture) as image:
            assert min(image.size) > 500
    assert 'eta: ' in result.stdout + result.stderr


def test_a_demo_can_read_its_own_checkpoint_with_any_mmengine(tmp_path, monkeypatch):
    # The original one calls torch.load as it is, which since 2.6 refuses log histories.
    torch.save({'history': HistoryBuffer([1.0], [1])}, tmp_path / 'iter_1.pth')
    monkeypatch.delenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run').touch()
    with pytest.raises(InputError):
        run_demo('det', tmp_path / 'run')
    assert torch.load(tmp_path / 'iter_1.pth')['history'].mean() == 1


def test_demo_configs_and_data_agree_on_the_classes():
    detector = load_config(str(ROOT / TASKS['det'].config)).metainfo
    segmentor = load_config(str(ROOT / TASKS['seg'].config)).metainfo
    assert tuple(detector.classes) == CLASSES
    assert tuple(segmentor.classes) == SEG_CLASSES
    assert [tuple(colour) for colour in detector.palette] == list(PALETTE)
    assert [tuple(colour) for colour in segmentor.palette] == list(SEG_PALETTE)
