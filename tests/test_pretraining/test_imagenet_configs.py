"""The ImageNet configs: networks, optimizer groups, schedule, pipelines, differences."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS, TRANSFORMS, init_default_scope
from PIL import Image
from torch import nn

from ssn_plugin import SSN

pytest.importorskip('mmpretrain')

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / 'configs/imagenet').glob('*.py'))
NORMS = {'ssn': SSN, 'bn': nn.BatchNorm2d, 'gn': nn.GroupNorm}
NUM_NORMS = {18: 20, 34: 36, 50: 53, 101: 104}


def parts(path):
    """Depth, norm and images per GPU, from the file name."""
    pattern = r'resnet(\d+)_(ssn|bn|gn)(?:-paper)?_8xb(\d+)_in1k'
    depth, norm, images = re.fullmatch(pattern, path.stem).groups()
    return int(depth), norm, int(images)


def load(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    return cfg


def build(cfg):
    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))
    model.init_weights()
    return model


def test_depths_norms_and_batches():
    found = {parts(path) for path in CONFIGS}
    assert {(depth, 'ssn', 32) for depth in NUM_NORMS} <= found
    assert {(depth, norm, 32) for depth in (18, 50) for norm in NORMS} <= found
    assert {(50, norm, 2) for norm in NORMS} <= found


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_model_is_the_recipes(path):
    depth, norm, images = parts(path)
    cfg = load(path)
    model = build(cfg)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, NORMS[norm])}
    assert len(norms) == NUM_NORMS[depth]
    every = (SSN, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    assert sum(isinstance(module, every) for module in model.modules()) == len(norms)
    last = f'{model.backbone.norm1_name[:-1]}{2 if depth < 50 else 3}'
    for name, module in norms.items():
        in_block = re.search(r'layer\d\.\d+\.\w+$', name)
        assert module.weight.unique().tolist() == [float(not (in_block and name.endswith(last)))]
        if norm == 'ssn':
            assert (module.momentum, module.correction) == (0.003, 0)
            paper = '-paper' in path.stem
            assert module.normalizers == (('IN', 'LN', 'BN') if paper else ('LN', 'GN', 'BN'))
        elif norm == 'gn':
            assert module.num_groups == 32
        else:
            assert module.momentum == 0.1
    pool = model.backbone.maxpool
    assert (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (3, 2, 0, True)
    assert model.head.dropout.p == 0.5
    assert model.head.fc.weight.shape == (1000, 512 if depth < 50 else 2048)
    assert cfg.train_dataloader.batch_size == images


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_one_step_by_the_rules(path):
    """A real step; then one on gradients so large that clipping decides the update."""
    from mmpretrain.structures import DataSample

    _, norm, images = parts(path)
    cfg = load(path)
    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    rate = 0.1 * 8 * images / 256
    named = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    control = {name for name in named if name.endswith(('mean_weight', 'var_weight'))}
    assert len(control) == (2 * NUM_NORMS[parts(path)[0]] if norm == 'ssn' else 0)
    seen = set()
    for group in wrapper.optimizer.param_groups:
        assert group['momentum'] == 0.9
        for parameter in group['params']:
            name = names[id(parameter)]
            expected = (rate * 0.1, 0.0) if name in control else (rate, 1e-4)
            assert (group['lr'], group['weight_decay']) == pytest.approx(expected), name
            seen.add(name)
    assert seen == set(named)

    batch = dict(
        inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)],
        data_samples=[DataSample().set_gt_label(7), DataSample().set_gt_label(999)],
    )
    losses = model.train().train_step(batch, wrapper)
    assert all(value.isfinite().all() for value in losses.values())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    if norm != 'ssn':
        return
    wrapper.optimizer.zero_grad()
    wrapper.optimizer.state.clear()
    before = {name: named[name].detach().clone() for name in control}
    for name in control:
        named[name].grad = torch.full_like(named[name], 100.0)
    wrapper.optimizer.step()
    moved = torch.cat([before[name] - named[name].detach() for name in control])
    assert moved.norm().item() == pytest.approx(rate * 0.1, rel=1e-4)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_schedule(path):
    _, norm, images = parts(path)
    cfg = load(path)
    start = 0.1 * 8 * images / 256
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=start)
    (scheduler,) = [
        PARAM_SCHEDULERS.build(dict(s, optimizer=optimizer)) for s in cfg.param_scheduler
    ]
    rates = []
    for _ in range(cfg.train_cfg.max_epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(
        [start * 0.1 ** sum(e >= m for m in (30, 60, 90)) for e in range(100)]
    )
    assert cfg.auto_scale_lr.base_batch_size == 8 * images

    hook = HOOKS.build(copy.deepcopy(cfg.default_hooks.switch_recipe))
    assert type(hook).__name__ == 'SwitchRecipeHook'
    assert list(hook.schedule) == [96]  # counted from 1: epochs 96 to 100 are the last five
    hooks = [hook['type'] for hook in cfg.get('custom_hooks', [])]
    ours = ['SSNRadiusHook', 'SSNRatioHook', 'SSNResumeHook', 'SSNStartHook']
    assert hooks == (ours if norm == 'ssn' else [])
    if norm == 'ssn':
        radius, ratios, *_ = (HOOKS.build(copy.deepcopy(hook)) for hook in cfg.custom_hooks)
        assert radius.radius_at(0, 500) == 0
        assert radius.radius_at(499, 500) == 1
        end = 1.0 if '-paper' in path.stem else 0.3
        assert radius.radius_at(75, 501) == pytest.approx(0.15 / end)
        assert ratios.interval == 100


def pipeline(transforms):
    from mmengine.dataset import Compose

    return Compose([TRANSFORMS.build(copy.deepcopy(t)) for t in transforms])


@pytest.fixture
def picture(tmp_path):
    def write(pixels):
        path = tmp_path / 'picture.png'
        Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
        return dict(img_path=str(path), gt_label=3)

    return write


def test_training_pictures(picture):
    np.random.seed(0)
    cfg = load(CONFIGS[0])
    transforms = cfg.train_dataloader.dataset.pipeline
    assert [t.type for t in transforms] == [
        'LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip', 'ColorJitter', 'Lighting',
        'PackInputs',
    ]  # fmt: skip
    jitter = TRANSFORMS.build(copy.deepcopy(transforms[3]))
    for amount in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert amount == pytest.approx((0.6, 1.4))
    assert jitter.hue is None
    rows, columns = np.indices((300, 400))
    item = picture(np.stack([rows * 255 / 299, columns * 255 / 399, 0 * rows], -1))
    train = pipeline(transforms)
    outputs = [train(dict(item)) for _ in range(20)]
    assert {tuple(o['inputs'].shape) for o in outputs} == {(3, 224, 224)}
    assert int(outputs[0]['data_samples'].gt_label) == 3
    # the column ramp is in the middle channel: mirrored pictures fall from left to right
    rising = [(o['inputs'][1, :, -1] > o['inputs'][1, :, 0]).float().mean() > 0.5 for o in outputs]
    assert 4 <= sum(rising) <= 16


@pytest.mark.parametrize(('as_float', 'wraps'), [(True, False), (False, True)])
def test_lighting_does_not_wrap_around(picture, as_float, wraps):
    """White stays bright; on bytes it would not, which is why the pictures are loaded as floats."""
    np.random.seed(0)
    item = picture(np.full((64, 64, 3), 255))
    load_image, *_, lighting, pack = load(CONFIGS[0]).train_dataloader.dataset.pipeline
    assert load_image.to_float32
    light = pipeline([dict(load_image, to_float32=as_float), lighting, pack])
    darkest = min(float(light(dict(item))['inputs'].min()) for _ in range(20))
    assert (darkest < 100) is wraps


def test_lighting_is_in_the_order_of_the_channels():
    """The main component of ImageNet's colours, by the published table in red, green, blue."""
    lighting = load(CONFIGS[0]).train_dataloader.dataset.pipeline[4]
    published = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    vectors = np.array(lighting.eigvec)
    assert np.array_equal(vectors[::-1], published)  # loaded pictures are blue, green, red
    assert np.allclose(vectors.T @ vectors, np.eye(3), atol=1e-3)
    assert lighting.alphastd == 0.1
    assert not lighting.get('to_rgb', False)


def test_last_epochs_and_test_pictures(picture):
    """Short side 256; training takes any window of 224, testing the middle one."""
    np.random.seed(0)
    cfg = load(CONFIGS[0])
    rows, columns = np.indices((256, 320))
    item = picture(np.stack([columns % 256, rows, columns // 256], -1))
    last = pipeline(cfg.default_hooks.switch_recipe.schedule[0].train_pipeline)
    corners = set()
    for _ in range(20):
        pixels = last(dict(item))['inputs'].int()  # blue, green, red
        assert pixels.shape == (3, 224, 224)
        x, y = pixels[2] + 256 * pixels[0], pixels[1]
        assert torch.equal(y, y[:1, :1] + torch.arange(224)[:, None].expand(224, 224))
        assert x[0].diff().abs().unique().tolist() == [1]  # not scaled; mirrored or not
        corners.add((int(x.min()), int(y.min())))
    assert len(corners) > 10
    test = pipeline(cfg.test_dataloader.dataset.pipeline)
    pixels = test(dict(item))['inputs'].int()
    assert pixels.shape == (3, 224, 224)
    assert (int(pixels[2, 0, 0]), int(pixels[1, 0, 0])) == (48, 16)


def test_pictures_become_normalised_rgb():
    cfg = load(CONFIGS[0])
    preprocess = build(cfg).data_preprocessor
    red = torch.zeros(3, 8, 8)
    red[2] = 255  # of a loaded picture
    out = preprocess(dict(inputs=[red]), training=False)['inputs'][0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(out[:, 0, 0], (torch.tensor([1.0, 0, 0]) - mean) / std)


@pytest.mark.parametrize(
    'path', [path for path in CONFIGS if parts(path)[1] != 'ssn'], ids=lambda path: path.stem
)
def test_baseline_differs_in_the_norm_alone(path):
    ssn, baseline = (load(p).to_dict() for p in (
        path.with_name(path.name.replace(f'_{parts(path)[1]}_', '_ssn_')), path
    ))  # fmt: skip
    for cfg in (ssn, baseline):
        cfg['model']['backbone'].pop('norm_cfg')
        for rule in ('constructor', 'paramwise_cfg'):
            cfg['optim_wrapper'].pop(rule, None)
        cfg['default_hooks']['checkpoint'].pop('type')  # the same but for how it writes
        for key in (
            'custom_hooks',
            'ssn_norm',
            'ssn_optim_wrapper',
            'ssn_default_hooks',
            'filename',
        ):
            cfg.pop(key, None)
    assert baseline == ssn


@pytest.mark.parametrize('norm', NORMS)
def test_small_batches_differ_in_batch_and_rate_alone(norm):
    large, small = (
        load(ROOT / f'configs/imagenet/resnet50_{norm}_8xb{n}_in1k.py').to_dict() for n in (32, 2)
    )
    assert small['optim_wrapper']['optimizer'].pop('lr') == pytest.approx(0.1 * 16 / 256)
    assert large['optim_wrapper']['optimizer'].pop('lr') == 0.1
    assert small['train_dataloader'].pop('batch_size') == 2
    assert large['train_dataloader'].pop('batch_size') == 32
    for cfg in (large, small):
        cfg.pop('auto_scale_lr')
    assert small == large
