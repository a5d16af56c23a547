"""Networks of the frameworks with BatchNorm, taken over by the same ones with SSN."""

import copy
import logging
import os
from collections import defaultdict
from importlib import import_module

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from plain_resnet import relative_error
from released_files import save
from tool_runs import run_here
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssn_plugin import SSN, collapse_ssn, set_radius
from ssn_plugin.deploy.collapse import choices_of
from ssn_plugin.errors import CheckpointError
from ssn_plugin.layers.convert import control_of_bn
from ssn_plugin.models.collapsed_model import collapsed_config

NORMS = {'BN', 'SyncBN', 'BN1d'}
BN = dict(type='BN')
HRNET = dict(
    stage1=dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1,),
                num_channels=(8,)),
    stage2=dict(num_modules=1, num_branches=2, block='BASIC', num_blocks=(1, 1),
                num_channels=(4, 8)),
    stage3=dict(num_modules=1, num_branches=3, block='BASIC', num_blocks=(1, 1, 1),
                num_channels=(4, 8, 16)),
    stage4=dict(num_modules=1, num_branches=4, block='BASIC', num_blocks=(1, 1, 1, 1),
                num_channels=(4, 8, 16, 32)),
)  # fmt: skip

BACKBONES = {
    'mmdet': {
        'ResNet': dict(depth=18, base_channels=8),
        'ResNeXt': dict(depth=50, groups=2, base_width=2, base_channels=8),
        'ResNeSt': dict(depth=50, base_channels=16, stem_channels=16),
        'Res2Net': dict(depth=50, base_channels=16, scales=4, base_width=8),
        'RegNet': dict(arch='regnetx_400mf'),
        'TridentResNet': dict(
            depth=50, base_channels=8, num_branch=3, test_branch_idx=1, strides=(1, 2, 2),
            dilations=(1, 1, 1), trident_dilations=(1, 2, 3), num_stages=3, out_indices=(2,),
        ),
        'HRNet': dict(extra=HRNET),
        'Darknet': dict(depth=53),
        'CSPDarknet': dict(deepen_factor=0.33, widen_factor=0.125),
        'CSPNeXt': dict(deepen_factor=0.167, widen_factor=0.125),
        'MobileNetV2': dict(widen_factor=0.25),
        'EfficientNet': dict(arch='b0'),
    },
    'mmseg': {
        'ResNetV1c': dict(depth=18, base_channels=8, stem_channels=8),
        'MobileNetV3': dict(arch='small', out_indices=(0, 1, 12)),
        'UNet': dict(base_channels=4),
        'CGNet': dict(num_channels=(8, 16, 32), num_blocks=(2, 2)),
        'FastSCNN': dict(downsample_dw_channels=(8, 12), global_in_channels=16,
                         global_block_channels=(16, 24, 32), global_out_channels=32,
                         higher_in_channels=16, lower_in_channels=32, fusion_out_channels=32),
        'STDCNet': dict(stdc_type='STDCNet1', in_channels=3, channels=(8, 16, 32, 64, 128),
                        bottleneck_type='cat', num_convs=4, act_cfg=dict(type='ReLU')),
        'MSCAN': dict(embed_dims=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
        'DDRNet': dict(channels=8),
        'PIDNet': dict(channels=8, ppm_channels=8, num_stem_blocks=2, num_branch_blocks=2),
        'ICNet': dict(
            backbone_cfg=dict(type='ResNetV1c', depth=18, base_channels=8, stem_channels=8),
            layer_channels=(16, 64), light_branch_middle_channels=8, psp_out_channels=16,
            out_channels=(8, 16, 16),
        ),
    },
    'mmpretrain': {
        'MobileNetV3': dict(arch='small_075'),
        'ShuffleNetV2': dict(widen_factor=0.5, out_indices=(0, 1, 2)),
        'SEResNet': dict(depth=50, base_channels=8),
        'VGG': dict(depth=11),
        'RepVGG': dict(arch='A0'),
        'CSPDarkNet': dict(depth=53),
    },
}  # fmt: skip
# These give their own init_cfg to their blocks, of which some say that they are not filled.
FILLED_TWICE = ('RepVGG', 'CSPDarkNet')
CASES = [(host, kind) for host, kinds in BACKBONES.items() for kind in kinds]


def with_norm(node, norm, kinds=NORMS):
    """A config in which every BatchNorm is another norm."""
    if isinstance(node, dict):
        if node.get('type') in kinds:
            return type(node)({**node, 'type': norm})
        return type(node)((key, with_norm(value, norm, kinds)) for key, value in node.items())
    if isinstance(node, list | tuple):
        return type(node)(with_norm(value, norm, kinds) for value in node)
    return node


def build(host, config):
    torch.manual_seed(1)
    with DefaultScope.overwrite_default_scope(host):
        return MODELS.build(copy.deepcopy(config))


def as_trained(model):
    """Weights and statistics of a network that works, none of them what a new one has."""
    generator = torch.Generator().manual_seed(2)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            if name.endswith('num_batches_tracked'):
                value.fill_(7)
            continue
        noise = torch.rand(value.shape, generator=generator)
        if value.dim() > 1:
            value.copy_((2 * noise - 1) * (3 / max(value[0].numel(), 1)) ** 0.5)
        elif name.endswith(('running_mean', 'bias')):
            value.copy_(0.2 * noise - 0.1)
        else:
            value.copy_(0.7 + 0.6 * noise)
    model.eval()  # gives nothing back in some
    return model


def pairs(network, model):
    """Modules of one place: both networks are built in the same order."""
    theirs, ours = list(network.modules()), list(model.modules())
    assert len(theirs) == len(ours)
    return zip(theirs, ours, strict=True)


def assert_taken_over(network, model, ratio=0.9):
    """Every tensor bit for bit; where there was BatchNorm and is SSN, at the ratio."""
    found = 0
    for theirs, ours in pairs(network, model):
        held = {**theirs._parameters, **theirs._buffers}
        for key, value in held.items():
            if value is not None and key not in theirs._non_persistent_buffers_set:
                assert torch.equal(getattr(ours, key), value), (type(ours), key)
        if isinstance(ours, SSN):
            assert isinstance(theirs, _BatchNorm)
            rest = (1 - ratio) / 2
            for ratios in (ours.mean_ratios, ours.var_ratios):
                assert ratios.tolist() == pytest.approx([rest, rest, ratio], abs=1e-6)
            found += 1
    return found


def made_exact(model):
    for layer in model.modules():
        if isinstance(layer, SSN):
            layer.load_state_dict(control_of_bn(layer.normalizers, 1), strict=False)
    model.eval()
    return model


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def assert_same_outputs(found, expected):
    outputs = list(zip(tensors(found), tensors(expected), strict=True))
    assert outputs
    for ours, theirs in outputs:
        assert relative_error(ours, theirs.double()) < 1e-5
    # and something comes out that depends on the input
    assert any(theirs.std() > 1e-3 for _, theirs in outputs)


@pytest.fixture
def log(request):
    """What is logged, by level."""
    lines = defaultdict(list)
    handler = logging.Handler()
    handler.emit = lambda record: lines[record.levelname].append(record.getMessage())
    logger = MMLogger.get_instance(request.node.name)  # a new one is the current one
    logger.addHandler(handler)
    assert MMLogger.get_current_instance() is logger
    yield lines
    logger.removeHandler(handler)


def networks(host, kind, path, prefix='', **kwargs):
    """A backbone with BatchNorm, and the same with SSN and its file as ``init_cfg``."""
    pytest.importorskip(host)
    import_module(f'{host}.models')
    config = dict(type=kind, **BACKBONES[host][kind], norm_cfg=dict(type='BN'))
    if kind == 'ICNet':
        config['backbone_cfg'] = config['backbone_cfg'] | dict(norm_cfg=dict(type='BN'))
    network = as_trained(build(host, config))
    state = {f'{prefix}{key}': value for key, value in network.state_dict().items()}
    save({'state_dict': state}, path)
    init_cfg = dict(type='Pretrained', checkpoint=f'bn2ssn://{path}')
    model = build(host, with_norm(config, 'SSN') | dict(init_cfg=init_cfg) | kwargs)
    return network, model


@pytest.mark.parametrize(('host', 'kind'), CASES)
def test_backbones(host, kind, tmp_path, log):
    network, model = networks(host, kind, tmp_path / 'bn.pth')
    model.init_weights()
    count = assert_taken_over(network, model)
    assert count > 5
    if kind != 'PIDNet':  # which loads by itself
        assert f'{count} of {count} SSN layers start from its norms' in '\n'.join(log['INFO'])
    if kind not in FILLED_TWICE:
        assert log['WARNING'] == []
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_same_outputs(made_exact(model)(x), network(x))


@pytest.mark.parametrize(
    ('kind', 'count'),
    [('ResNet', 0), ('ResNet', 1), ('ResNet', 4), ('RegNet', 1), ('CSPDarknet', 1), ('CSPNeXt', 4),
     ('MobileNetV2', 1)],
)  # fmt: skip
def test_frozen_stages_are_exactly_batch_norm(kind, count, tmp_path, log):
    """From a whole model's file, where stages freeze when built and where in train()."""
    network, model = networks('mmdet', kind, tmp_path / 'bn.pth', 'backbone.', frozen_stages=count)
    stages = build('mmdet', dict(type=kind, **BACKBONES['mmdet'][kind], frozen_stages=count))
    stages.train()
    norms = [module for module in stages.modules() if isinstance(module, _BatchNorm)]
    frozen = sum(not norm.weight.requires_grad for norm in norms)
    assert 0 < frozen <= len(norms)
    model.init_weights()
    decided = [m for m in model.modules() if isinstance(m, SSN) and m.mean_fixed == 1]
    assert len(decided) == frozen
    assert all(layer.selected == ('BN', 'BN') for layer in decided)
    assert not any(p.requires_grad for layer in decided for p in layer.parameters())
    assert any('frozen, so decided for BN' in line for line in log['INFO'])
    model.train()
    set_radius(model, 0.4)
    for theirs, ours in pairs(network, model):
        if ours in decided:
            x = torch.randn(2, theirs.num_features, 5, 5)
            assert torch.equal(ours.eval()(x), theirs(x))


def test_deformable_convolutions_and_plugins_start_anew(tmp_path, log):
    pytest.importorskip('mmdet')
    plain = dict(type='ResNet', depth=50, base_channels=8, norm_cfg=dict(type='BN'))
    network = as_trained(build('mmdet', plain))
    path = save(network.state_dict(), tmp_path / 'bn.pth')
    plugin = dict(cfg=dict(type='ContextBlock', ratio=0.25), stages=(False, True, False, False),
                  position='after_conv3')  # fmt: skip
    for kind in ('SSNResNet', 'ResNet'):
        config = dict(plain, type=kind, norm_cfg=dict(type='SSN'), plugins=[plugin])
        config['init_cfg'] = dict(type='Pretrained', checkpoint=f'bn2ssn://{path}')
        if kind == 'SSNResNet':
            config['stem_padding'] = 1
        model = build('mmdet', config)
        model.init_weights()
        assert torch.equal(model.layer2[0].conv2.weight, network.layer2[0].conv2.weight)
        said = [line for lines in log.values() for line in lines if 'not in' in line]
        assert len(said) == 1
        assert 'context_block.conv_mask.weight' in said[0]
        log.clear()


class Block(BaseModule):
    def __init__(self, width, norm_cfg, init_cfg):
        super().__init__(init_cfg)
        self.conv = ConvModule(3, width, 3, norm_cfg=norm_cfg)


class GivesItsInitCfgAway(BaseModule):
    """As RepVGG and CSPDarkNet of mmpretrain do."""

    def __init__(self, norm_cfg, init_cfg=None):
        super().__init__(init_cfg)
        widths = (8, 4, 16, 16)
        self.blocks = nn.ModuleList(Block(width, norm_cfg, init_cfg) for width in widths)


def test_blocks_with_the_init_cfg_of_their_network(tmp_path, log):
    network = as_trained(GivesItsInitCfgAway(dict(type='BN')))
    path = save(network.state_dict(), tmp_path / 'bn.pth')
    init_cfg = dict(type='Pretrained', checkpoint=f'bn2ssn://{path}')
    model = GivesItsInitCfgAway(dict(type='SSN'), init_cfg)
    model.init_weights()
    assert assert_taken_over(network, model) == 4
    assert '4 of 4 SSN layers start from its norms' in '\n'.join(log['INFO'])


# ---------------------------------------------------------------- whole models

WHOLE = {
    'mmdet': {
        'retinanet/retinanet_r18_fpn_1x_coco.py': {
            'backbone': dict(base_channels=8),
            'neck': dict(in_channels=[8, 16, 32, 64], out_channels=16,
                         norm_cfg=dict(type='BN')),
            'bbox_head': dict(in_channels=16, feat_channels=16, stacked_convs=1,
                              norm_cfg=dict(type='BN')),
        },
        'rtmdet/rtmdet_tiny_8xb32-300e_coco.py': {
            'backbone': dict(widen_factor=0.125),
            'neck': dict(in_channels=[32, 64, 128], out_channels=32, num_csp_blocks=1),
            'bbox_head': dict(in_channels=32, feat_channels=32),
        },
        'yolox/yolox_tiny_8xb8-300e_coco.py': {
            'backbone': dict(widen_factor=0.125, norm_cfg=dict(type='BN')),
            'neck': dict(in_channels=[32, 64, 128], out_channels=32, norm_cfg=dict(type='BN')),
            'bbox_head': dict(in_channels=32, feat_channels=32, norm_cfg=dict(type='BN')),
        },
        'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py': {
            'backbone': dict(widen_factor=0.25, norm_cfg=dict(type='BN')),
            'neck': dict(in_channels=[80, 24, 8], out_channels=[16, 16, 16],
                         norm_cfg=dict(type='BN')),
            'bbox_head': dict(in_channels=[16, 16, 16], out_channels=[16, 16, 16],
                              norm_cfg=dict(type='BN')),
        },
    },
    'mmseg': {
        'pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py': {
            'backbone': dict(base_channels=8, stem_channels=8),
            'decode_head': dict(in_channels=64, channels=16),
            'auxiliary_head': dict(in_channels=32, channels=16),
        },
        'fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py': {},
        'hrnet/fcn_hr18s_4xb2-40k_cityscapes-512x1024.py': {
            'decode_head': dict(channels=24),
        },
        'unet/unet-s5-d16_deeplabv3_4xb4-40k_stare-128x128.py': {
            'backbone': dict(base_channels=8),
            'decode_head': dict(in_channels=8, channels=16),
            'auxiliary_head': dict(in_channels=16, channels=16),
        },
    },
    'mmpretrain': {
        '_base_/models/resnet34_gem.py': {
            'backbone': dict(base_channels=8, norm_cfg=BN),
            'head': dict(in_channels=64, num_classes=10),
        },
        '_base_/models/seresnet50.py': {
            'backbone': dict(base_channels=8, norm_cfg=BN),
            'head': dict(in_channels=256, num_classes=10),
        },
        '_base_/models/mobilenet_v3/mobilenet_v3_small_cifar.py': {
            'backbone': dict(arch='small_075', norm_cfg=BN),
            'head': dict(in_channels=432, mid_channels=[16], norm_cfg=dict(type='BN1d')),
        },
        '_base_/models/efficientnet_b0.py': {'backbone': dict(norm_cfg=BN)},
        '_base_/models/regnet/regnetx_400mf.py': {'backbone': dict(norm_cfg=BN)},
        '_base_/models/convmixer/convmixer-768-32.py': {
            'backbone': dict(arch=dict(embed_dims=16, depth=8, patch_size=7, kernel_size=7),
                             norm_cfg=BN),
            'head': dict(in_channels=16, num_classes=10),
        },
        '_base_/models/vgg11bn.py': {
            'backbone': dict(num_classes=-1),
            'neck': [
                dict(type='GlobalAveragePooling'),
                dict(type='LinearNeck', in_channels=512, out_channels=64, gap_dim=0,
                     norm_cfg=dict(type='BN1d')),
            ],
            'head': dict(type='LinearClsHead', in_channels=64, num_classes=10),
        },
        '_base_/models/shufflenet_v1_1x.py': {'backbone': dict(norm_cfg=BN)},
        '_base_/models/shufflenet_v2_1x.py': {'backbone': dict(norm_cfg=BN)},
        '_base_/models/hrnet/hrnet-w18.py': {
            'backbone': dict(arch=None, extra=HRNET, norm_cfg=BN),
            'neck': [
                dict(type='HRFuseScales', in_channels=(4, 8, 16, 32), norm_cfg=BN),
                dict(type='GlobalAveragePooling'),
            ],
        },
        'byol/byol_resnet50_16xb256-coslr-200e_in1k.py': {
            'backbone': dict(depth=18, base_channels=8),
            'neck': dict(in_channels=64, hid_channels=32, out_channels=16,
                         norm_cfg=dict(type='BN1d')),
            'head': dict(predictor=dict(type='NonLinearNeck', in_channels=16, hid_channels=32,
                                        out_channels=16, with_avg_pool=False,
                                        norm_cfg=dict(type='BN1d'))),
        },
    },
}  # fmt: skip
WHOLE_CASES = [(host, config) for host, configs in WHOLE.items() for config in configs]


def whole_config(host, name):
    package = pytest.importorskip(host)
    import_module(f'{host}.models')
    path = os.path.join(os.path.dirname(package.__file__), '.mim', 'configs', name)
    model = Config.fromfile(path).model
    for part, changes in WHOLE[host][name].items():
        model[part] = model[part] | changes if isinstance(changes, dict) else changes
    model.pop('pretrained', None)
    for part in model.values():
        if isinstance(part, dict):
            part.pop('init_cfg', None)
            if part.get('norm_eval'):
                part.norm_eval = False
    model.backbone.pop('frozen_stages', None)
    return model


def loaded_by_runner(host, config, path, tmp_path, hook=True):
    with DefaultScope.overwrite_default_scope(host):
        runner = Runner(
            copy.deepcopy(config), str(tmp_path), default_scope=host, load_from=f'bn2ssn://{path}',
            custom_hooks=[dict(type='SSNRadiusHook')] * hook, experiment_name=f'{tmp_path.name}',
        )  # fmt: skip
        runner.load_or_resume()
    return runner.model


def outputs_of(model, x):
    features = model.extract_feat(x)
    if hasattr(model, 'target_net'):  # BYOL
        projected = model.neck(features)
        return features, projected, model.head.predictor(projected), model.target_net.module(x)
    return features, model.bbox_head(features) if hasattr(model, 'bbox_head') else model(x)


@pytest.mark.parametrize(('host', 'name'), WHOLE_CASES)
def test_whole_models(host, name, tmp_path):
    config = whole_config(host, name)
    network = as_trained(build(host, with_norm(config, 'BN', {'SyncBN'})))
    path = save({'state_dict': network.state_dict()}, tmp_path / 'bn.pth')
    config = with_norm(config, 'SSN')
    model = loaded_by_runner(host, config, path, tmp_path)
    assert assert_taken_over(network, model) > 8
    converted = str(tmp_path / 'ssn.pth')
    assert run_here('warm_start.py', path, converted)[0] == 0
    for checkpoint in (f'bn2ssn://{path}', converted):
        same = build(host, config | dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint)))
        same.init_weights()
        assert_taken_over(network, same)
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        assert_same_outputs(outputs_of(made_exact(model), x), outputs_of(network, x))


def test_a_whole_model_with_other_classes_and_its_backbone_alone_with_ssn(tmp_path):
    """What is another starts anew, what kept BatchNorm keeps it; all of it is said."""
    config = whole_config('mmdet', next(iter(WHOLE['mmdet'])))
    network = as_trained(build('mmdet', config))
    path = save({'state_dict': network.state_dict()}, tmp_path / 'bn.pth')
    config.backbone = with_norm(config.backbone, 'SSN')
    config.bbox_head.num_classes = 3
    model = loaded_by_runner('mmdet', config, path, tmp_path)
    assert assert_taken_over(network.backbone, model.backbone) == 20
    assert assert_taken_over(network.neck, model.neck) == 0
    head = model.bbox_head
    assert torch.equal(head.retina_reg.weight, network.bbox_head.retina_reg.weight)
    (log,) = tmp_path.rglob('*.log')
    text = log.read_text()
    assert '20 of 20 SSN layers start from its norms at an importance ratio of 0.9' in text
    assert 'start anew, not in load_from: bbox_head.retina_cls.weight' in text


@pytest.mark.parametrize('norm_eval', [True, False])
def test_frozen_stages_in_a_whole_model(norm_eval, tmp_path):
    config = whole_config('mmdet', next(iter(WHOLE['mmdet'])))
    network = as_trained(build('mmdet', config))
    path = save({'state_dict': network.state_dict()}, tmp_path / 'bn.pth')
    config = with_norm(config, 'SSN')
    config.backbone.update(
        type='SSNResNet', stem_padding=1, frozen_stages=1, norm_eval=norm_eval, init_cfg=None
    )
    model = loaded_by_runner('mmdet', config, path, tmp_path).train()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SSN)}
    frozen = [name for name in layers if name.startswith(('backbone.sn1', 'backbone.layer1.'))]
    assert [name for name, m in layers.items() if m.selected == ('BN', 'BN')] == frozen
    assert not any(layers[name].training for name in frozen)
    assert layers['backbone.layer2.0.sn1'].training is not norm_eval
    (log,) = tmp_path.rglob('*.log')
    assert 'frozen, so decided for BN, exactly BatchNorm: backbone (5) layers' in log.read_text()


def test_a_whole_model_whose_norms_do_not_fit(tmp_path):
    config = whole_config('mmdet', next(iter(WHOLE['mmdet'])))
    path = save(build('mmdet', config).state_dict(), tmp_path / 'bn.pth')
    config = with_norm(config, 'SSN')
    config.neck.out_channels = config.bbox_head.in_channels = 8
    with pytest.raises(CheckpointError, match=r'neck.*weight is \[16\], expected \[8\]'):
        loaded_by_runner('mmdet', config, path, tmp_path)


@pytest.mark.parametrize('prefix', ['neck', 'neck.'])
def test_a_part_of_a_whole_model(prefix, tmp_path):
    config = whole_config('mmdet', next(iter(WHOLE['mmdet'])))
    network = as_trained(build('mmdet', config))
    path = save({'state_dict': network.state_dict()}, tmp_path / 'bn.pth')
    init_cfg = dict(type='Pretrained', checkpoint=f'bn2ssn://{path}', prefix=prefix)
    neck = build('mmdet', with_norm(config.neck, 'SSN') | dict(init_cfg=init_cfg))
    neck.init_weights()
    assert assert_taken_over(network.neck, neck) == 8


def test_teacher_and_student_start_from_one_detector(tmp_path):
    """The file has no such names, and a teacher is frozen because it follows, not to stay."""
    config = whole_config('mmdet', next(iter(WHOLE['mmdet'])))
    network = as_trained(build('mmdet', config))
    path = save({'state_dict': network.state_dict()}, tmp_path / 'bn.pth')
    pair = dict(
        type='SemiBaseDetector', detector=with_norm(config, 'SSN'),
        semi_train_cfg=dict(freeze_teacher=True), semi_test_cfg=dict(predict_on='teacher'),
    )  # fmt: skip
    model = loaded_by_runner('mmdet', pair, path, tmp_path)
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert assert_taken_over(network, model.student) == 30
    assert assert_taken_over(network, model.teacher) == 30


def test_a_backbone_alone_in_load_from(tmp_path):
    config = whole_config('mmdet', next(iter(WHOLE['mmdet'])))
    network = as_trained(build('mmdet', config.backbone))
    path = save(network.state_dict(), tmp_path / 'bn.pth')
    model = loaded_by_runner('mmdet', with_norm(config, 'SSN'), path, tmp_path)
    assert assert_taken_over(network, model.backbone) == 20
    (log,) = tmp_path.rglob('*.log')
    assert '20 of 30 SSN layers start from its norms' in log.read_text()


class SharesANorm(BaseModule):
    """One norm, and one convolution, under two names each."""

    def __init__(self, norm_cfg, init_cfg=None):
        super().__init__(init_cfg)
        self.first = ConvModule(3, 8, 3, norm_cfg=norm_cfg)
        self.second = ConvModule(8, 8, 3, norm_cfg=norm_cfg)
        self.third = self.second
        setattr(self.second, self.second.norm_name, self.first.norm)

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def test_a_norm_under_several_names(tmp_path, log):
    network = as_trained(SharesANorm(BN))
    path = save(network.state_dict(), tmp_path / 'bn.pth')
    checkpoint = dict(type='Pretrained', checkpoint=f'bn2ssn://{path}')
    model = SharesANorm(dict(type='SSN', normalizers=('BN', 'LN')), checkpoint)
    model.init_weights()
    assert log['WARNING'] == []
    assert not any('left out' in line for line in log['INFO'])
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert_same_outputs(made_exact(model)(x), network(x))


# ---------------------------------------------------------------- networks without norm_cfg


@MODELS.register_module()
class NamesBatchNorm(BaseModule):
    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn2(self.stem(x))


WITHOUT_NORM_CFG = {
    'mmengine': {'NamesBatchNorm': dict()},
    'mmpretrain': {
        'MobileViT': dict(arch='xx_small'),
        'LeViT': dict(arch='128s', img_size=64),
    },
}


@pytest.mark.parametrize(
    ('host', 'kind'), [(host, kind) for host, kinds in WITHOUT_NORM_CFG.items() for kind in kinds]
)
def test_networks_that_name_batch_norm_in_their_code(host, kind, tmp_path, log):
    pytest.importorskip(host)
    config = dict(type=kind, **WITHOUT_NORM_CFG[host][kind])
    network = as_trained(build(host, config))
    path = save(network.state_dict(), tmp_path / 'bn.pth')
    config['init_cfg'] = dict(type='Pretrained', checkpoint=f'bn2ssn://{path}')
    with pytest.raises(CheckpointError, match=r"norm_cfg.* type='ConvertedSSN' and network="):
        build(host, config).init_weights()
    model = build(host, config | dict(type='ConvertedSSN', network=kind))
    model.init_weights()
    norms = sum(isinstance(module, _BatchNorm) for module in network.modules())
    assert sum(isinstance(module, SSN) for module in model.modules()) == norms > 1
    assert log['WARNING'] == []
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_same_outputs(made_exact(model)(x), network(x))
    # and its collapsed config
    set_radius(model, 1.0)
    again = Config(dict(model=config | dict(type='ConvertedSSN', network=kind)))
    collapsed = build(host, collapsed_config(again, choices_of(model)).model)
    collapsed.load_state_dict(collapse_ssn(copy.deepcopy(model)).state_dict())
    collapsed.eval()
    with torch.no_grad():
        assert_same_outputs(collapsed(x), network(x))
