"""Every shipped config: loads, builds, trains one step, predicts, and has SSN where it says so."""

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import nn
from yaml import safe_load

from ssn_plugin import SN, SSN, SyncSSN

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

ROOT = Path(__file__).resolve().parent.parent
ALL = sorted(path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts)
# mmpretrain and mmaction2 have environments and tests of their own: test_pretraining and
# test_other_codebases.
ELSEWHERE = ('imagenet', 'kinetics', 'faces')
CONFIGS = [
    path for path in ALL if path.parent.name not in ELSEWHERE and not path.name.startswith('resnet')
]
TASKS = ('coco', 'cityscapes', 'ade20k')
TASK_CONFIGS = [path for path in CONFIGS if path.parent.name in TASKS]
STEM = re.compile(
    r'(?:(?:mask|faster)-rcnn_r50_fpn_(?:ssn|bn|gn|sn)-(?:backbone_1x|all_2x)_coco'
    r'|deeplabv3(?:plus)?_r50-d8_(?:ssn-all|syncbn|gn-all|sn-all)'
    r'_(?:4xb2-80k_cityscapes-512x1024|4xb4-80k_ade20k-512x512))'
)
# Their siblings on one GPU: number of images, and what else stands in the name of the parent.
ONE_GPU = re.compile(r'(.*)_1xb([12])-(\w+?)_(.*)')
# By the name in a config's file name; the first class that fits counts.
NORMS = {
    'syncssn': SyncSSN,
    'ssn': SSN,
    'sn': SN,
    'syncbn': nn.SyncBatchNorm,
    'bn': nn.modules.batchnorm._BatchNorm,
    'gn': nn.GroupNorm,
    'in': nn.modules.instancenorm._InstanceNorm,
    'ln': nn.LayerNorm,
}
# Norm layers per part of the network: FPN has 4 lateral and 4 output convolutions, ASPP the pooled
# branch, four others and the bottleneck; DeepLabV3+ makes three of those separable (one norm more
# each), adds the low-level branch and two separable convolutions.
BACKBONE_NORMS = 53
HEAD_NORMS = {
    'mask-rcnn_backbone': {},
    'faster-rcnn_backbone': {},
    'mask-rcnn_all': {'neck': 8, 'roi_head.bbox_head': 4, 'roi_head.mask_head': 4},
    'deeplabv3': {'decode_head': 6, 'auxiliary_head': 1},
    'deeplabv3plus': {'decode_head': 14, 'auxiliary_head': 1},
}


def name_of(path: Path) -> str:
    return path.stem


def norm_of(path: Path) -> str:
    return re.search(r'_(ssn|syncbn|bn|gn|sn)[-_]', path.stem).group(1)


def load(path: Path, *options: str) -> Config:
    """The config, with command-line options applied as a train script applies them."""
    cfg = Config.fromfile(path)
    action = DictAction(['--cfg-options'], dest='cfg_options')
    namespace = type('Namespace', (), {})()
    action(None, namespace, options)
    cfg.merge_from_dict(namespace.cfg_options)
    return cfg


def build(path: Path) -> tuple[Config, nn.Module]:
    """The config and its model at reduced input size and proposal number, without weights."""
    cfg = load(path, 'model.backbone.init_cfg=None')
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == 'mmdet':
        cfg.model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
        cfg.model.train_cfg.rcnn.sampler.num = 8
        cfg.model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
        # an untrained classifier is sure of nothing; the masks of what it finds are to be computed
        cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=2)
    else:
        cfg.model.data_preprocessor.size = (64, 64)
    return cfg, MODELS.build(cfg.model)


def detection_batch(cfg: Config) -> dict:
    from mmdet.testing import demo_mm_inputs

    # numbers of box classes differ between COCO (80) and the demo, and class 0 and 1 exist in both
    return demo_mm_inputs(
        2, [(3, 64, 96), (3, 96, 64)], num_items=[2, 1], num_classes=2, with_mask=True
    )


def segmentation_batch(cfg: Config, batch_size: int) -> dict:
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(batch_size):
        labels = torch.randint(cfg.model.decode_head.num_classes, (1, 64, 64))
        labels[:, :8] = 255
        meta = {'img_shape': (64, 64), 'ori_shape': (64, 64), 'pad_shape': (64, 64)}
        sample = SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=labels))
        samples.append(sample)
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples]
    return {'inputs': images, 'data_samples': samples}


def norms_in(module: nn.Module) -> Counter:
    kinds = (
        next((name for name, kind in NORMS.items() if isinstance(m, kind)), None)
        for m in module.modules()
    )
    return Counter(kind for kind in kinds if kind is not None)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_configs_exist() -> None:
    # 3 networks x 4 norms on COCO, 2 networks x 4 norms on each of the other two
    own = [path for path in TASK_CONFIGS if not ONE_GPU.match(path.stem)]
    assert Counter(path.parent.name for path in own) == {'coco': 12, 'cityscapes': 8, 'ade20k': 8}
    others = [path for path in TASK_CONFIGS if path not in own]
    assert Counter(path.parent.name for path in others) == {'coco': 3, 'cityscapes': 2, 'ade20k': 1}
    assert {norm_of(path) for path in others} == {'ssn'}


def parent_of(path: Path) -> Path:
    """The config of several GPUs that one of a single GPU is for."""
    network, _, schedule, data = ONE_GPU.match(path.stem).groups()
    several = {'coco': schedule, 'cityscapes': f'4xb2-{schedule}', 'ade20k': f'4xb4-{schedule}'}
    return path.with_name(f'{network}_{several[path.parent.name]}_{data}.py')


@pytest.mark.parametrize(
    'path', [path for path in TASK_CONFIGS if ONE_GPU.match(path.stem)], ids=name_of
)
def test_a_config_of_one_gpu_changes_images_and_learning_rate(path: Path) -> None:
    ours, parents = load(path), load(parent_of(path))
    images = int(ONE_GPU.match(path.stem)[2])
    gpus = 8 if path.parent.name == 'coco' else 4
    share = images / (gpus * parents.train_dataloader.batch_size)
    assert ours.train_dataloader.batch_size == images
    rates = [cfg.optim_wrapper.optimizer.pop('lr') for cfg in (ours, parents)]
    assert rates[0] == pytest.approx(rates[1] * share)
    assert ours.model.backbone.pop('norm_eval')  # the decided backbone on its stored statistics
    parents.model.backbone.pop('norm_eval')
    for cfg in (ours, parents):
        cfg.train_dataloader.pop('batch_size')
        cfg.pop('auto_scale_lr', None)
    assert ours.to_dict() == parents.to_dict()


@pytest.mark.parametrize('path', TASK_CONFIGS, ids=name_of)
def test_file_name_follows_pattern(path: Path) -> None:
    assert STEM.fullmatch((parent_of(path) if ONE_GPU.match(path.stem) else path).stem)
    assert path.stem.split('_')[-1].split('-')[0] == path.parent.name


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS, ids=name_of)
def test_config_trains_one_step_and_predicts(path: Path) -> None:
    cfg, model = build(path)
    model.init_weights()
    is_detector = cfg.default_scope == 'mmdet'
    if is_detector:
        batch = detection_batch(cfg)
    elif 'syncbn' in norms_in(model):
        # on CPU SyncBN is not defined, and BatchNorm refuses the pooled branch of one image
        model, batch = revert_sync_batchnorm(model), segmentation_batch(cfg, 2)
    else:
        batch = segmentation_batch(cfg, 1)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    losses = model.train().train_step(copy.deepcopy(batch), optim_wrapper)

    assert losses
    assert all(value.isfinite().all() for value in losses.values()), losses
    after = model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    for name, module in model.named_modules():
        if isinstance(module, (SSN, SN)):
            frozen = not module.weight.requires_grad
            # Frozen layers are held in evaluation, and with norm_eval those of the whole backbone.
            held = frozen or (name.startswith('backbone.') and model.backbone.norm_eval)
            moved = not after[f'{name}.running_mean'].equal(before[f'{name}.running_mean'])
            assert moved != held, name
            assert module.mean_weight.requires_grad != frozen, name
    moved = {name.rsplit('.', 1)[-1] for name in after if not after[name].equal(before[name])}
    switchable = any(isinstance(module, (SSN, SN)) for module in model.modules())
    assert moved >= {'weight', 'bias'}
    assert ({'mean_weight', 'var_weight'} <= moved) == switchable

    with torch.no_grad():
        results = model.eval().test_step(copy.deepcopy(batch))
    assert len(results) == len(batch['inputs'])
    for result in results:
        if is_detector:
            boxes = result.pred_instances
            assert 0 < len(boxes) <= 2
            assert ('masks' in boxes) == (cfg.model.type == 'MaskRCNN')
            assert boxes.scores.isfinite().all()
        else:
            assert result.pred_sem_seg.shape == (64, 64)
            assert result.seg_logits.data.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS, ids=name_of)
def test_norms_are_where_the_name_says(path: Path) -> None:
    cfg = load(path, 'model.backbone.init_cfg=None')
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    norm = norm_of(path)
    if path not in TASK_CONFIGS:
        assert set(norms_in(model)) == {norm}
        return
    network = path.stem.split('_')[0]
    if path.parent.name == 'coco':
        network += '_all' if '-all_' in path.stem else '_backbone'
    expected = {'backbone': BACKBONE_NORMS, **HEAD_NORMS[network]}

    if norm == 'ssn' and cfg.default_scope == 'mmseg':
        norm = 'syncssn'
    for part, count in expected.items():
        assert norms_in(model.get_submodule(part)) == {norm: count}, part
    assert norms_in(model) == {norm: sum(expected.values())}, 'a norm in another part'


@pytest.mark.parametrize('path', CONFIGS, ids=name_of)
def test_ssn_configs_carry_the_training_rules(path: Path) -> None:
    cfg = load(path)
    init_default_scope(cfg.default_scope)
    hooks = {hook['type']: hook for hook in cfg.get('custom_hooks', [])}
    for hook in hooks.values():
        HOOKS.build(copy.deepcopy(hook))
    uses_ssn = any(f"type='{name}'" in repr_of(cfg.model) for name in ('SSN', 'SyncSSN'))
    uses_plugin = uses_ssn or "type='SN'" in repr_of(cfg.model)

    assert ('custom_imports' in cfg) == uses_plugin
    if uses_plugin:
        assert cfg.custom_imports == {'imports': ['ssn_plugin'], 'allow_failed_imports': False}
    for kind in ('Radius', 'Ratio', 'Resume'):
        assert (f'SSN{kind}Hook' in hooks) == uses_ssn
    checkpoint = cfg.default_hooks.checkpoint
    assert checkpoint.type == ('SSNCheckpointHook' if uses_ssn else 'CheckpointHook')
    HOOKS.build(copy.deepcopy(checkpoint))
    constructor = cfg.optim_wrapper.get('constructor')
    assert constructor == ('SSNOptimWrapperConstructor' if uses_plugin else None)
    if uses_plugin:
        rules = {'ssn_lr_mult': 1.0, 'ssn_decay_mult': 0.0, 'ssn_clip_norm': None}
        if uses_ssn:
            rules.update(ssn_lr_mult=0.1, ssn_clip_norm=1.0)
        assert cfg.optim_wrapper.paramwise_cfg == rules
    if uses_ssn:
        hook = hooks['SSNRadiusHook']
        assert (hook.begin, hook.end, hook.start_radius, hook.end_radius) == (0.0, 0.3, 0.0, 1.0)


@pytest.mark.parametrize('path', [p for p in CONFIGS if norm_of(p) == 'ssn'], ids=name_of)
def test_layers_that_have_yet_to_choose_have_the_one_variable(path: Path) -> None:
    cfg = load(path, 'model.backbone.init_cfg=None')
    init_default_scope(cfg.default_scope)
    shipped = Config.fromfile(ROOT / 'configs/_base_/ssn_training.py').ssn_norm.normalizers
    released = path in TASK_CONFIGS  # whose weights decide the backbone
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    for name, layer in model.named_modules():
        if isinstance(layer, SSN):
            papers = released and name.startswith('backbone.')
            assert layer.normalizers == (('IN', 'LN', 'BN') if papers else shipped), name
            if not papers:  # GN is another normalizer than IN and LN
                assert 1 < layer.num_groups < layer.num_features, name


def repr_of(model_cfg: dict) -> str:
    return Config({'model': model_cfg}).pretty_text.replace('"', "'")


@pytest.mark.parametrize(
    'path', [path for path in TASK_CONFIGS if norm_of(path) != 'ssn'], ids=name_of
)
def test_baseline_differs_from_ssn_in_norm_and_weights_alone(path: Path) -> None:
    norm = norm_of(path)
    where = '' if norm != 'syncbn' else '-all'
    ssn = load(path.with_name(path.name.replace(f'_{norm}', f'_ssn{where}', 1)))
    baseline = load(path)
    for cfg in (baseline, ssn):
        cfg.default_hooks.checkpoint.pop('type')  # the same but for how it writes

    for key in (
        'train_cfg',
        'param_scheduler',
        'train_dataloader',
        'val_dataloader',
        'val_evaluator',
        'default_hooks',
        'env_cfg',
    ):
        assert baseline[key] == ssn[key], key
    assert baseline.optim_wrapper.optimizer == ssn.optim_wrapper.optimizer
    for cfg in (baseline.model, ssn.model):
        for key in ('type', 'norm_eval', 'init_cfg'):
            cfg.backbone.pop(key)
        drop_norm_cfgs(cfg)
    assert baseline.model == ssn.model


def drop_norm_cfgs(cfg: dict) -> None:
    cfg.pop('norm_cfg', None)
    for value in cfg.values():
        if isinstance(value, dict):
            drop_norm_cfgs(value)


@pytest.mark.parametrize('path', TASK_CONFIGS, ids=name_of)
def test_pretrained_weights_come_from_the_one_variable(path: Path) -> None:
    key = {'syncbn': 'bn'}.get(norm_of(path), norm_of(path)) + '_r50'
    pretrained = Config.fromfile(ROOT / 'configs/_base_/pretrained.py').pretrained
    given = {'type': 'Pretrained', 'checkpoint': pretrained[key]}
    assert load(path).model.backbone.init_cfg == given
    other = load(path, 'model.backbone.init_cfg.checkpoint=mine.pth')
    assert other.model.backbone.init_cfg == {'type': 'Pretrained', 'checkpoint': 'mine.pth'}
    assert load(path, 'model.backbone.init_cfg=None').model.backbone.init_cfg is None


@pytest.mark.parametrize('folder', ['coco', 'cityscapes'])
def test_weights_given_on_the_command_line_are_loaded(folder: str, tmp_path: Path) -> None:
    path = next(p for p in TASK_CONFIGS if p.parent.name == folder and norm_of(p) == 'ssn')
    _, model = build(path)
    weights = {name: torch.full_like(v, 0.5) for name, v in model.backbone.state_dict().items()}
    torch.save({'state_dict': weights}, tmp_path / 'mine.pth')

    cfg = load(path, f'model.backbone.init_cfg.checkpoint={tmp_path}/mine.pth')
    init_default_scope(cfg.default_scope)
    backbone = MODELS.build(cfg.model.backbone)
    backbone.init_weights()

    assert backbone.sn1.weight.unique() == 0.5
    assert backbone.layer4[2].sn3.running_var.unique() == 0.5


def test_own_config_needs_the_fragment_alone(tmp_path: Path) -> None:
    fragment = ROOT / 'configs/_base_/ssn_training.py'
    (tmp_path / 'own.py').write_text(
        f"_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '{fragment}']\n"
        'model = dict(neck=dict(norm_cfg=_base_.ssn_norm))\n'
        'optim_wrapper = {{_base_.ssn_optim_wrapper}}\n'
    )
    cfg = load(tmp_path / 'own.py', 'model.backbone.init_cfg=None')
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)

    assert norms_in(model.neck) == {'ssn': 8}
    assert cfg.optim_wrapper.optimizer.lr == 0.01
    control = {id(m.mean_weight) for m in model.neck.modules() if isinstance(m, SSN)}
    rates = {
        group['lr']
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
        if id(parameter) in control
    }
    assert rates == {0.001}


def test_model_index_imports_every_metafile() -> None:
    imported = safe_load((ROOT / 'model-index.yml').read_text())['Import']
    found = [path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('metafile.yml')]
    assert sorted(imported) == sorted(found)


@pytest.mark.parametrize('folder', [*TASKS, *ELSEWHERE])
def test_metafile_names_each_config_and_no_other(folder: str) -> None:
    metafile = safe_load((ROOT / 'configs' / folder / 'metafile.yml').read_text())
    collections = {collection['Name'] for collection in metafile['Collections']}
    for collection in metafile['Collections']:
        assert (ROOT / collection['README']).is_file()
    named = [model['Config'] for model in metafile['Models']]
    assert sorted(named) == [
        path.relative_to(ROOT).as_posix() for path in ALL if path.parent.name == folder
    ]
    for model in metafile['Models']:
        assert model['Name'] == Path(model['Config']).stem
        assert model['In Collection'] in collections
        cfg = load(ROOT / model['Config'])
        meta = model['Metadata']
        assert meta.get('Epochs') == cfg.train_cfg.get('max_epochs')
        assert meta.get('Iterations') == cfg.train_cfg.get('max_iters')
        gpus = 8 if folder in ('coco', *ELSEWHERE) else 4
        gpus = 1 if ONE_GPU.match(model['Name']) else gpus
        assert meta['Batch Size'] == gpus * cfg.train_dataloader.batch_size


@pytest.mark.parametrize('folder', [*TASKS, *ELSEWHERE])
def test_readme_lists_every_config(folder: str) -> None:
    text = (ROOT / 'configs' / folder / 'README.md').read_text()
    for path in ALL:
        if path.parent.name == folder:
            assert f'[{path.stem}]({path.name})' in text


@pytest.mark.parametrize(
    'readme',
    [
        ROOT / 'README.md',
        *sorted((ROOT / 'configs').rglob('*.md')),
        *sorted(ROOT.glob('docs/*.md')),
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_configs_named_in_text_exist(readme: Path) -> None:
    if not readme.is_file():
        pytest.skip(f'{readme.name} is not written')
    text = readme.read_text()
    for name in re.findall(r'(?<![\w/:])configs/[\w./+-]+\.py', text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r'\]\(([\w./+-]+\.py)\)', text):
        assert (readme.parent / name).is_file(), name
