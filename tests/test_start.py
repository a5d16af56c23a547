"""The tools say before the first step what will not work, in one line and with the remedy."""

import subprocess
import sys
from pathlib import Path

import pytest
from tool_runs import TOOLS, run_here

from demo_data import make_demo_dataset

ROOT = TOOLS.parent
CONFIG = ROOT / 'configs/demo/deeplabv3plus_r18-d8_ssn-all_demo.py'
SHORT = [
    'train_cfg.max_iters=1',
    'train_cfg.val_interval=1',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
]
# Another norm in all three places, by what it is that the child config forgets.
PLAIN = """
_base_ = ['{config}']
bn = dict(_delete_=True, type='BN')
model = dict(
    backbone=dict(type='ResNet', norm_cfg=bn),
    decode_head=dict(norm_cfg=bn),
    auxiliary_head=dict(norm_cfg=bn),
)
"""
AS_IT_IS_MEANT = """
norm_cfg = dict(_delete_=True, type='BN')
custom_hooks = []
"""
# BatchNorm in the branch of ASPP that pools the image to one value.
POOLING = """
_base_ = ['{config}']
model = dict(decode_head=dict(norm_cfg=dict(_delete_=True, type='BN')))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('start')
    make_demo_dataset(path / 'data/demo', num_train=3, num_val=1, size=128)
    (path / 'forgotten.py').write_text(PLAIN.format(config=CONFIG))
    (path / 'pooling.py').write_text(POOLING.format(config=CONFIG))
    (path / 'plain.py').write_text(PLAIN.format(config=CONFIG) + AS_IT_IS_MEANT)
    return path


def train(folder: Path, config: object, *options: str) -> tuple[int, str, str]:
    """Exit code, the last line of errors, and the log."""
    arguments = [config, '--work-dir', 'run', '--cfg-options', *SHORT, *options]
    result = subprocess.run(
        [sys.executable, str(TOOLS / 'train.py'), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert 'Traceback' not in result.stderr, result.stderr[-3000:]
    return result.returncode, result.stderr.splitlines()[-1], result.stdout


@pytest.fixture
def refused(folder, monkeypatch):
    """Gives the line by which a tool ends before the framework's script begins."""
    monkeypatch.chdir(folder)

    def refused(*arguments: object) -> str:
        code, _, err = run_here(*map(str, arguments))
        assert code == 1
        return err.splitlines()[-1]

    return refused


def test_a_child_config_whose_norm_reaches_nothing(refused):
    line = refused('train.py', 'forgotten.py')
    assert line.startswith('train.py: model: has no SSN layer, although norm_cfg is SSN: ')
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        assert f'model.{part}.norm_cfg is BN' in line


def test_the_block_of_the_log_and_batch_norm_on_one_value(folder):
    """The tool adds the hook, and explains what torch says of the image pool at one image."""
    code, line, log = train(folder, 'pooling.py', 'train_dataloader.batch_size=1')
    assert code == 1
    assert line.startswith('train.py: decode_head.image_pool.1.bn: got one value per channel')
    block = log.partition('SSNStartHook:')[2]
    assert '21 SSN in backbone (20), auxiliary_head.convs.0.sn (1); candidates LN, GN, BN' in block
    assert '14 BatchNorm2d in decode_head (14), which stay what they are' in block
    assert 'WARNING' not in block  # LN, GN and BN as they should be


def test_more_classes_than_the_head_has(folder):
    code, line, _ = train(folder, CONFIG, 'model.decode_head.num_classes=3')
    assert code == 1
    assert line.startswith('train.py: decode_head.num_classes: got 3, expected at least 5')


def test_norms_of_a_checkpoint_that_are_not_the_models(folder, refused):
    code, line, _ = train(folder, 'plain.py')
    assert code == 0, line
    checkpoint = 'run/iter_1.pth'
    line = refused('test.py', CONFIG, checkpoint)
    assert f'checkpoint: {checkpoint} has 20 BN in backbone, where the model has 20 SSN' in line
    line = refused('train.py', CONFIG, '--cfg-options', f'load_from={checkpoint}')
    assert f'load_from: {checkpoint} has 20 BN in backbone' in line
    assert f'bn2ssn://{checkpoint}' in line
