"""A work dir as a training leaves it half-way: config, ratios.jsonl, logged numbers."""

from pathlib import Path

from ssn_plugin.analysis.history import HISTORY_FILE, append_to_history, start_history
from ssn_plugin.analysis.layer_ratios import LayerRatios

NAMES = ('IN', 'LN', 'BN')
CONFIG = """
default_scope = 'mmdet'
custom_imports = dict(imports=['ssn_plugin', 'a_package_that_is_not_here'])
model = dict(type='MaskRCNN', neck=dict(type='FPN', norm_cfg=dict(type='SSN', eps=0.125)))
note = '<script>alert("not run")</script> & more'
train_cfg = dict(type='IterBasedTrainLoop', max_iters=20)
custom_hooks = [dict(type='SSNRadiusHook', end=0.5, priority='HIGH')]
"""


def rows(layers: int) -> list[LayerRatios]:
    found = []
    for i in range(layers):
        name = 'backbone.sn1' if i == 0 else f'backbone.layer{1 + 4 * i // layers}.{i}.sn1'
        found.append(
            LayerRatios(name, NAMES, (0.0, 0.25, 0.75), (0.0, 0.0, 1.0), 0.6, False, True, 64)
        )
    return found


def work_dir(folder: Path, layers: int = 53) -> Path:
    """A folder as a training of some iterations leaves it."""
    folder.mkdir()
    (folder / 'a_config.py').write_text(CONFIG)
    about = dict(max_iters=20, versions={'torch': '2.99.9'})
    run = start_history(folder / HISTORY_FILE, rows(layers), about)
    for iteration in (5, 10):
        append_to_history(folder / HISTORY_FILE, iteration, rows(layers), 0.6, 1.0, run)
    logs = folder / '20260102_030405' / 'vis_data'
    logs.mkdir(parents=True)
    (logs / 'scalars.json').write_text(
        '{"lr": 0.1, "loss": 2.5, "step": 5}\n{"mIoU": 61.5, "step": 0}\n'
    )
    return folder
