"""Folding: found by where the data goes, exact, and nothing folded that something else needs."""

import copy
import ctypes
import inspect
from pathlib import Path

import mmcv.cnn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from plain_resnet import relative_error
from random_state import randomize_affine_and_running
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ssn_plugin import collapse_ssn, find_foldable, fold_batch_norms, set_radius
from ssn_plugin.layers.plain_norms import BatchNorm


def trained(model: nn.Module) -> nn.Module:
    """In float64 and evaluation, with BatchNorms as after some training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            randomize_affine_and_running(module)
    return model.double().eval()


def image(channels: int = 4, size: int = 9) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def assert_folds(model: nn.Module, pairs: list[tuple[str, str]], x: Tensor | None = None) -> None:
    """These pairs are found, no other, and folding them leaves the outputs."""
    x = image() if x is None else x

    def run(model):
        return model(x)

    trained(model)
    before = copy.deepcopy(model.state_dict())
    expected = run(model)
    assert find_foldable(model, run) == pairs
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert fold_batch_norms(model, pairs) is model
    torch.testing.assert_close(run(model), expected, rtol=1e-9, atol=1e-9)
    assert find_foldable(model, run) == []


# What is found and folded exactly


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('settings', [{}, dict(stride=2, padding=1), dict(groups=2, dilation=2)])
@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('transposed', [False, True])
def test_every_convolution(bias, affine, settings, dims, transposed):
    kind = getattr(nn, f'Conv{"Transpose" if transposed else ""}{dims}d')
    norm = getattr(nn, f'BatchNorm{dims}d')
    model = nn.Sequential(kind(4, 6, 3, bias=bias, **settings), norm(6, affine=affine), nn.ReLU())
    x = torch.randn(2, 4, *(7, 6, 5)[:dims], dtype=torch.float64)
    assert_folds(model, [('0', '1')], x)


@pytest.mark.parametrize(
    'conv',
    [
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 8, 3, padding='same'),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode='reflect'),
        nn.ConvTranspose2d(4, 8, 3, 2, output_padding=1, groups=4),
        mmcv.cnn.bricks.wrappers.Conv2d(4, 8, 3),
        mmcv.cnn.bricks.wrappers.ConvTranspose2d(4, 8, 3),
    ],
    ids=lambda conv: f'{type(conv).__module__.partition(".")[0]}-{conv}',
)
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.SyncBatchNorm, BatchNorm])
def test_kinds(conv, norm):
    assert_folds(nn.Sequential(copy.deepcopy(conv), norm(conv.out_channels)), [('0', '1')])


def test_channels_last():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    model.to(memory_format=torch.channels_last)
    assert_folds(model, [('0', '1')], image().to(memory_format=torch.channels_last))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


class Block(nn.Module):
    """A residual block whose modules were registered in an order of their own."""

    def __init__(self, channels: int = 4, width: int = 6) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.norm1(self.conv1(x)))
        return F.relu_(self.norm2(self.conv2(y)).add_(self.shortcut(x)))


PAIRS = [('conv2', 'norm2'), ('conv1', 'norm1'), ('shortcut.0', 'shortcut.1')]


def test_residual_blocks():
    pairs = [(f'{i}.{conv}', f'{i}.{norm}') for i in range(2) for conv, norm in PAIRS]
    assert_folds(nn.Sequential(Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), pairs)


def test_a_block_that_is_called_twice_and_has_two_names():
    block = Block()
    model = nn.ModuleDict({'a': block, 'b': nn.Sequential(block, block)})
    model.forward = lambda x: model['b'](x)
    assert_folds(model, [(f'a.{conv}', f'a.{norm}') for conv, norm in PAIRS])
    assert isinstance(model['b'][0].norm1, nn.Identity)


def test_a_batch_norm_under_two_names():
    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.same_norm = self.norm

        def forward(self, x):
            return self.same_norm(self.conv(x))

    assert_folds(Twin(), [('conv', 'norm')])
    model = fold_batch_norms(trained(Twin()), [('conv', 'same_norm')])
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.same_norm, nn.Identity)


class Pyramid(nn.Module):
    """A head over several levels that share convolutions, BatchNorms, both, or neither."""

    def __init__(self, share_conv: bool, share_norm: bool) -> None:
        super().__init__()
        convs = [nn.Conv2d(4, 4, 3) for _ in range(1 if share_conv else 2)]
        norms = [nn.BatchNorm2d(4) for _ in range(1 if share_norm else 2)]
        self.levels = nn.ModuleList(nn.Sequential(convs[-i], norms[-i]) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return sum(level(F.relu(x - i)) for i, level in enumerate(self.levels))


@pytest.mark.parametrize(
    ('share_conv', 'share_norm', 'pairs'),
    [
        (False, False, [('levels.0.0', 'levels.0.1'), ('levels.1.0', 'levels.1.1')]),
        (True, False, []),
        (False, True, []),
        (True, True, [('levels.0.0', 'levels.0.1')]),
    ],
)
def test_pyramids(share_conv, share_norm, pairs):
    assert_folds(Pyramid(share_conv, share_norm), pairs)


def test_conv_modules_of_mmcv():
    norm = dict(type='BN')
    model = nn.Sequential(
        ConvModule(4, 6, 3, norm_cfg=norm),
        ConvModule(6, 6, 3, norm_cfg=norm, order=('norm', 'conv', 'act')),
        ConvModule(6, 8, 3, norm_cfg=norm, act_cfg=None, bias=True),
    )
    # The second's BatchNorm stands after an activation.
    assert_folds(model, [('0.conv', '0.bn'), ('2.conv', '2.bn')])
    assert model[0].with_norm
    assert isinstance(model[0].norm, nn.Identity)


def test_tied_weights():
    # Each convolution gets a weight of its own; the one without BatchNorm keeps the old.
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    assert_folds(model, [('0', '1')])


def test_inference_mode_and_several_calls():
    model = trained(Block())
    images = [image(size=size) for size in (5, 8)]

    def run(model):
        with torch.inference_mode():
            return [model(x) for x in images]

    assert find_foldable(model, run) == PAIRS


# What is not


class Uses(nn.Module):
    """Convolution and BatchNorm, and a function of input, output of the first, of the second."""

    def __init__(self, use) -> None:
        super().__init__()
        self.use = use
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.other, self.pool = nn.Conv2d(4, 4, 1), nn.MaxPool2d(1)
        self.kept = None

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        return self.use(self, x, y, self.norm(y))


def keep(model, x, y, z):
    model.kept = y
    return z


@pytest.mark.parametrize(
    'use',
    [
        lambda model, x, y, z: y + z,
        lambda model, x, y, z: y[:, 1:].mean() + z,
        lambda model, x, y, z: F.relu_(y).sum() * 0 + z,
        lambda model, x, y, z: (z, y),
        lambda model, x, y, z: {'z': z, 'y': y.flatten(1)},
        lambda model, x, y, z: z + model.other(y),
        lambda model, x, y, z: z + model.norm(y.mT),
        lambda model, x, y, z: z + model.norm(x),
        lambda model, x, y, z: z + model.norm(model.other(x)),
        lambda model, x, y, z: z + F.conv2d(x, model.conv.weight),
        lambda model, x, y, z: z + model.conv.bias.sum(),
        lambda model, x, y, z: z * model.norm.weight.view(-1, 1, 1),
        lambda model, x, y, z: z + model.norm.running_mean.mean(),
        lambda model, x, y, z: z + model.conv.forward(x),
        keep,
    ],
    ids=lambda use: inspect.getsource(use).strip().partition('z: ')[2].strip(',') or 'kept',
)
def test_other_uses(use):
    model = trained(Uses(use))
    assert find_foldable(model, lambda model: model(image())) == []


def test_the_model_of_other_uses_folds_without_them():
    assert_folds(Uses(lambda model, x, y, z: F.relu(z) + x), [('conv', 'norm')])


class Summary(nn.Module):
    """Reads its input past the operators of torch, as compiled code does."""

    def forward(self, x):
        array = np.frombuffer(ctypes.string_at(x.data_ptr(), 8 * x.numel()))
        return torch.tensor(array.mean())


def test_an_output_that_compiled_code_reads():
    model = Uses(lambda model, x, y, z: z + model.summary(y))
    model.summary = Summary()
    assert find_foldable(trained(model), lambda model: model(image())) == []


def test_an_output_that_only_run_uses():
    # No module and no operator does, but what `run` returns holds it.
    model = trained(nn.ModuleDict({'conv': nn.Conv2d(4, 4, 1), 'norm': nn.BatchNorm2d(4)}))

    def run(model):
        y = model['conv'](image())
        return model['norm'](y), y

    assert find_foldable(model, run) == []
    assert find_foldable(model, lambda model: run(model)[0]) == [('conv', 'norm')]


def test_an_output_of_the_model_that_run_drops():
    model = trained(Uses(lambda model, x, y, z: (z, [y])))
    assert find_foldable(model, lambda model: len(model(image()))) == []


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Live(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Shifted(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ('conv', 'norm'),
    [
        (Standardized(4, 4, 1), nn.BatchNorm2d(4)),
        (Shifted(4, 4, 1), nn.BatchNorm2d(4)),
        (nn.Conv2d(4, 4, 1), Doubled(4)),
        (nn.Conv2d(4, 4, 1), Live(4)),
        (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        (nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True)),
        (nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
        (mmcv.cnn.ConvWS2d(4, 4, 1), nn.BatchNorm2d(4)),
        (mmcv.cnn.ConvAWS2d(4, 4, 1), nn.BatchNorm2d(4)),
        (nn.Linear(9, 9), nn.BatchNorm2d(4)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers(conv, norm):
    model = trained(nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm)))
    assert find_foldable(model, lambda model: model(image())) == []


def test_a_convolution_of_mmcv_with_an_operator_of_its_own():
    ops = pytest.importorskip('mmcv.ops')
    model = trained(nn.Sequential(ops.ModulatedDeformConv2dPack(4, 4, 1), nn.BatchNorm2d(4)))
    assert find_foldable(model, lambda model: model(image())) == []


def test_batch_norm_in_training():
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model[1].train()
    assert find_foldable(model, lambda model: model(image())) == []


@pytest.mark.parametrize('index', [0, 1])
@pytest.mark.parametrize('when', ['register_forward_hook', 'register_forward_pre_hook'])
def test_layers_with_hooks(index, when):
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    getattr(model[index], when)(lambda *_: None)
    assert find_foldable(model, lambda model: model(image())) == []


def test_the_model_itself_and_what_does_not_run():
    for model in (nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Identity()):
        assert find_foldable(trained(model), lambda model: model(image())) == []
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    assert find_foldable(model, lambda model: None) == []
    with pytest.raises(RuntimeError, match='expected input'):
        find_foldable(model, lambda model: model(image(3)))
    assert find_foldable(model, lambda model: model(image())) == [('0', '1')]  # no hook was left


# What is kept, and what is refused


def test_settings_are_kept():
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    conv = model[0]
    fold_batch_norms(model, [('0', '1')])
    assert model[0] is conv
    assert not conv.weight.requires_grad
    assert conv.bias.requires_grad  # the convolution had one
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model[1].training

    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    model[1].bias.requires_grad_(False)
    fold_batch_norms(model, [('0', '1')])
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad
    assert list(model.state_dict()) == ['0.weight', '0.bias']


def test_device():
    with torch.device('meta'):
        model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    fold_batch_norms(model, [('0', '1')])
    assert {p.device.type for p in model.parameters()} == {'meta'}


@pytest.mark.parametrize(
    ('pairs', 'message'),
    [
        ([('0', '4')], r"^pairs: got nothing named '4' in the model, expected a BatchNorm with"),
        ([('1', '1')], r"got a BatchNorm2d named '1' in the model, expected a convolution$"),
        ([('0', '2')], r"got a ReLU named '2' in the model, expected a BatchNorm with running"),
        ([('0', '5')], r"got a BatchNorm2d without them named '5'"),
        ([('0', '3.1')], r"got 6 channels of '0' and 5 of '3.1', expected the same number"),
        ([('0', '1'), ('0', '1')], r"got \('0', '1'\) after another pair with one of them"),
        ([('', '1')], r"got a Sequential named ''"),
    ],
)
def test_wrong_pairs(pairs, message):
    deeper = nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5))
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), deeper)
    model.add_module('5', nn.BatchNorm2d(6, track_running_stats=False))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fold_batch_norms(model, [('3.0', '3.1'), *pairs][pairs[0][1] == '3.1' :])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


# Networks of the frameworks


def network(scope: str, config: str) -> nn.Module:
    cfg = Config.fromfile(Path(__file__).parents[2] / 'configs/demo' / config).model
    cfg.pop('pretrained', None)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg)
    set_radius(model, 1.0)  # all choose BN: at a tie it is the last candidate
    return trained(collapse_ssn(model))


@torch.no_grad()
def assert_network_folds(model: nn.Module, run, skipped: str = '-') -> None:
    """Every BatchNorm is folded, except where the names say that evaluation does not come by."""
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not name.startswith(skipped)
    ]
    expected = run(model)
    pairs = find_foldable(model, run)
    assert {norm for _, norm in pairs} == set(norms)
    assert len(pairs) == len(norms) > 20
    for ours, theirs in zip(run(fold_batch_norms(model, pairs)), expected, strict=True):
        assert theirs.abs().max() > 1e-3
        assert relative_error(ours, theirs) < 1e-9


def test_mask_rcnn():
    pytest.importorskip('mmdet')
    from mmengine.structures import InstanceData

    model = network('mmdet', 'mask-rcnn_r18_fpn_ssn-all_demo.py')
    x = image(3, 96)
    regions = torch.tensor([[0.0, 0, 30, 40], [10, 5, 90, 60]], dtype=x.dtype)

    def run(model):
        # In two steps, as mmcv has no non-maximum suppression in float64.
        features = model.extract_feat(x)
        rest = model.roi_head(features, [InstanceData(bboxes=regions)] * 2)
        return [*features, *tree_flatten(rest)[0]]

    assert_network_folds(model, run)


def test_deeplab():
    pytest.importorskip('mmseg')
    model = network('mmseg', 'deeplabv3plus_r18-d8_ssn-all_demo.py')
    x = image(3, 64)
    assert_network_folds(model, lambda model: [model(x)], skipped='auxiliary_head')
