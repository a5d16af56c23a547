"""No class of the frameworks runs what is pickled in a file, under whatever key it is named."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from pickled_code import Marker
from tool_runs import run, run_here

from ssn_plugin.checkpoint.unpickling import refuse_code
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.trained_model import build_model

ROOT = Path(__file__).parents[2]
TINY_STAGES = dict(depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


@pytest.fixture
def evil(tmp_path) -> str:
    """A checkpoint that makes the file `ran` beside it when it is unpickled."""
    path = tmp_path / 'iter_4.pth'
    meta = {'iter': 4, 'epoch': 0, 'x': Marker(tmp_path / 'ran')}
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'meta': meta, 'message_hub': {}}, path)
    yield str(path)
    assert not (tmp_path / 'ran').exists()


def distilled(path: str) -> dict:
    from network_zoo import settings_of

    student = settings_of('GFL').model
    teacher = dict(teacher_config=dict(model=copy.deepcopy(student)), teacher_ckpt=path)
    return {**student, **teacher, 'type': 'mmdet.KnowledgeDistillationSingleStageDetector'}


def label_assigning(path: str) -> dict:
    from network_zoo import settings_of

    student = settings_of('GFL').model
    teacher = {f'teacher_{part}': copy.deepcopy(student[part]) for part in ('backbone', 'neck')}
    head = dict(teacher_bbox_head=copy.deepcopy(student.bbox_head), teacher_ckpt=path)
    return {**student, **teacher, **head, 'type': 'mmdet.LAD'}


def initial(kind: str, **settings):
    """A model that starts from a file."""
    return lambda path: dict(
        type=kind, init_cfg=ConfigDict(type='Pretrained', checkpoint=path), **settings
    )


def clip(path: str) -> dict:
    return dict(
        type='mmseg.CLIPTextEncoder',
        embed_dims=8,
        num_heads=1,
        num_layers=1,
        output_dims=8,
        vocabulary=['cat'],
        init_cfg=dict(type='Pretrained_Part', checkpoint=path),
    )


# Classes that load by themselves, not by mmengine's PretrainedInit, and some that load by that.
MODELS_THAT_LOAD = {
    'teacher_ckpt': distilled,
    'teacher_ckpt of LAD': label_assigning,
    'DetectoRS_ResNet': lambda path: dict(
        type='mmdet.DetectoRS_ResNet', depth=50, base_channels=4, stem_channels=4, pretrained=path
    ),
    'mmdet.ResNet': initial('mmdet.ResNet', depth=18, base_channels=4, stem_channels=4),
    'mmdet.Swin': initial('mmdet.SwinTransformer', embed_dims=4, **TINY_STAGES),
    'mmseg.Swin': initial('mmseg.SwinTransformer', embed_dims=4, **TINY_STAGES),
    'mmdet.PVT': initial(
        'mmdet.PyramidVisionTransformer', embed_dims=8, num_layers=(1, 1, 1, 1)
    ),
    'mmseg.PIDNet': initial('mmseg.PIDNet', channels=4, ppm_channels=4),
    'mmseg.ViT': initial(
        'mmseg.VisionTransformer', img_size=32, embed_dims=8, num_heads=1, num_layers=1
    ),
    'mmseg.BEiT': initial('mmseg.BEiT', img_size=32, embed_dims=8, num_heads=1, num_layers=1),
    'mmseg.MAE': initial('mmseg.MAE', img_size=32, embed_dims=8, num_heads=1, num_layers=1),
    'mmseg.CLIPTextEncoder': clip,
}  # fmt: skip


@pytest.mark.parametrize('key', MODELS_THAT_LOAD)
def test_in_a_process_of_a_tool(evil, key):
    if 'mmseg' not in key:
        pytest.importorskip('mmdet')
    settings = MODELS_THAT_LOAD[key](evil)
    scope = 'mmseg' if 'mmseg' in settings['type'] else 'mmdet'
    pytest.importorskip(scope)
    init_default_scope(scope)
    refuse_code()
    with pytest.raises(CheckpointError, match=r'holds a pickled posix\.system') as caught:
        MODELS.build(settings).init_weights()
    assert evil in str(caught.value)


def test_a_model_that_is_built_for_another_job(evil):
    pytest.importorskip('mmdet')
    config = Config(dict(model=distilled(evil), default_scope='mmdet'))
    with pytest.raises(InputError, match=r'cannot build the model of kd\.py') as caught:
        build_model(config, 'kd.py')
    assert 'holds a pickled posix.system' in str(caught.value)


def training_config(folder: Path, changes: str = '') -> str:
    """A config that trains for one iteration on a data set that is as good as none."""
    pytest.importorskip('mmdet')
    base = ROOT / 'configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py'
    for part in ('annotations', 'train2017', 'val2017'):
        (folder / 'coco' / part).mkdir(parents=True)
    for split in ('train', 'val'):
        (folder / f'coco/annotations/instances_{split}2017.json').write_text('{}')
    root = str(folder / 'coco') + '/'
    (folder / 'config.py').write_text(
        f'_base_ = {str(base)!r}\n{changes}\nwork_dir = {str(folder)!r}\n'
        f'train_dataloader = dict(dataset=dict(data_root={root!r}))\n'
        f'val_dataloader = dict(dataset=dict(data_root={root!r}))\n'
        f'val_evaluator = dict(ann_file={root + "annotations/instances_val2017.json"!r})\n'
    )
    return str(folder / 'config.py')


@pytest.mark.parametrize(
    ('settings', 'arguments', 'named'),
    [
        ('resume = True', [], 'resume: '),
        ('', ['--resume'], 'resume: '),
        ('', ['--resume', '{evil}'], 'resume: '),
        ('', ['--cfg-options', 'resume=True'], 'resume: '),
        ('resume = True\nload_from = "{evil}"', [], 'resume: '),
        ('load_from = "{evil}"', [], 'load_from: '),
        (
            'model = dict(roi_head=dict(init_cfg=dict(type="Pretrained", checkpoint="{evil}")))',
            [],
            'model.roi_head.init_cfg.checkpoint: ',
        ),
    ],
)
def test_train_refuses_it_under_every_name(tmp_path, monkeypatch, evil, settings, arguments, named):
    (tmp_path / 'last_checkpoint').write_text(evil)
    config = training_config(tmp_path, settings.format(evil=evil))
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(evil=evil) for argument in arguments]
    code, _, err = run_here('train.py', config, *arguments)
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert err.startswith(f'train.py: {named}')
    if named:
        assert f'{evil}: refused, because reading it would run code' in err


@pytest.mark.parametrize('content', [b'\xff\xfe', b'', None])
def test_a_broken_note_of_the_last_checkpoint(tmp_path, monkeypatch, content):
    config = training_config(tmp_path, 'resume = True')
    note = tmp_path / 'last_checkpoint'
    note.mkdir() if content is None else note.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    code, _, err = run_here('train.py', config)
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert str(note) in err


@pytest.mark.slow
def test_what_the_checks_do_not_see_is_refused_when_it_is_read(tmp_path, evil):
    """A hook of the user's own, in a process as a user starts it."""
    (tmp_path / 'careless.py').write_text(
        'import pickle, torch\n'
        'from mmengine.hooks import Hook\n'
        'from mmengine.registry import HOOKS\n'
        '@HOOKS.register_module()\n'
        'class Careless(Hook):\n'
        '    def __init__(self, memory):\n'
        '        torch.load(memory, "cpu", pickle, weights_only=False)\n'
    )
    shutil.copy(evil, tmp_path / 'memory')
    config = training_config(
        tmp_path,
        "import sys\nsys.path.insert(0, {!r})\ncustom_imports = dict(imports=['ssn_plugin', "
        "'careless'])\ncustom_hooks = [dict(type='Careless', memory={!r})]".format(
            str(tmp_path), str(tmp_path / 'memory')
        ),
    )
    code, _, err = run('train.py', config)
    assert code == 1, err
    assert err.strip().splitlines()[-1].startswith('train.py: ')
    assert f'{tmp_path}/memory: refused' in err
    assert 'Traceback' not in err
