"""SSNStartHook: what the log says before the first step, and what makes a run senseless."""

from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModel
from torch import nn

from ssn_plugin import SN, SSN, SyncSSN, set_radius
from ssn_plugin.engine import start_check
from ssn_plugin.errors import InputError

HOOKS = (dict(type='SSNStartHook'), dict(type='SSNRadiusHook'))


def block_of(runner) -> str:
    """What the hook has written, with the lines that belong to it."""
    (log,) = Path(runner.work_dir).glob('*/*.log')
    _, *parts = log.read_text().split('SSNStartHook:')
    assert len(parts) == 1, 'it has to be told once'
    lines = parts[0].splitlines()
    return '\n'.join(line for line in lines[1:] if line.startswith('  '))


def trained(make_runner, hooks=HOOKS, **overrides):
    runner = make_runner(hooks=hooks, **overrides)
    runner.train()
    return block_of(runner)


def test_a_sound_run_has_facts_alone(make_runner):
    model = dict(type='ToyNet', norm_cfg=dict(type='SSN', normalizers=('LN', 'GN', 'BN')))
    block = trained(make_runner, validate=True, model=model)
    assert '2 SSN in norm1 (1), norm2 (1); candidates LN, GN, BN' in block
    assert '0 of 2 SSN layers are decided' in block
    assert 'images per process: 3' in block
    assert 'WARNING' not in block


@pytest.mark.parametrize('loop', ['val', 'test'])
def test_a_validation_or_a_test_alone(make_runner, loop):
    runner = make_runner(hooks=HOOKS, validate=True)
    if loop == 'val':
        runner.val()
    else:
        settings = dict(dataset=dict(type='ToyImages'), batch_size=3, num_workers=0)
        settings |= dict(collate_fn=dict(type='default_collate'))
        settings |= dict(sampler=dict(type='DefaultSampler', shuffle=False))
        runner = make_runner(
            hooks=HOOKS,
            test_dataloader=settings,
            test_cfg={},
            test_evaluator=dict(type='ToyMetric'),
        )
        runner.test()
    assert '2 SSN in' in block_of(runner)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_no_hook_that_grows_the_radius(make_runner, by_epoch):
    block = trained(make_runner, hooks=HOOKS[:1], by_epoch=by_epoch)
    assert 'WARNING no hook grows the radius, so 2 SSN layers will stay mixtures' in block
    assert "dict(type='SSNRadiusHook')" in block


def test_decided_layers_need_no_radius(make_runner):
    runner = make_runner(hooks=HOOKS[:1])
    set_radius(runner.model, 1.0)
    runner.train()
    assert 'WARNING' not in block_of(runner)
    assert '2 of 2 SSN layers are decided' in block_of(runner)


def test_no_constructor_for_control_parameters(make_runner):
    optimizer = dict(type='SGD', lr=0.05, weight_decay=1e-3)
    block = trained(make_runner, optim_wrapper=dict(optimizer=optimizer))
    assert 'control parameters get the weight decay 0.001 of all others' in block
    assert "constructor='SSNOptimWrapperConstructor'" in block


def test_norms_of_other_types_that_remain(make_runner):
    model = dict(type='ToyNet', second_norm_cfg=dict(type='BN'))
    block = trained(make_runner, model=model)
    assert '1 SSN in norm1 (1)' in block
    assert '1 BatchNorm2d in norm2 (1), which stay what they are' in block


def test_undecided_layers_that_do_not_learn(make_runner):
    model = dict(type='ToyNet', second_norm_cfg=dict(type='SSN', requires_grad=False))
    block = trained(make_runner, model=model)
    assert '1 undecided SSN layers do not learn and will stay mixtures, in norm2 (1)' in block
    assert 'requires_grad=True' in block
    assert 'frozen_stages=-1' in block


def single_images(collate_fn: object) -> dict:
    """A data loader."""
    sampler = dict(type='InfiniteSampler')
    loader = dict(batch_size=1, num_workers=0, sampler=sampler, collate_fn=collate_fn)
    return loader | dict(dataset=dict(type='ToyImages'))


def test_one_image_per_process(make_runner):
    loader = single_images(dict(type='default_collate'))
    block = trained(make_runner, train_dataloader=loader)
    assert 'WARNING images per process: 1, and 2 SSN layers have yet to select between' in block
    assert "normalizers=('LN', 'GN', 'BN')" in block
    model = dict(type='ToyNet', norm_cfg=dict(type='SSN', normalizers=('LN', 'GN', 'BN')))
    assert 'WARNING' not in trained(make_runner, model=model, train_dataloader=loader)


# ------------------------------------------------------------- the parts, on models of their own


class Backbone(nn.Module):
    """Holds its norms in evaluation, all of them or BatchNorm alone."""

    def __init__(self, norm_eval: bool, reaches_ssn: bool) -> None:
        super().__init__()
        self.norm_eval = norm_eval
        self.kinds = nn.Module if reaches_ssn else nn.BatchNorm2d
        self.layers = nn.ModuleList([SSN(4), SSN(4)])

    def train(self, mode=True):
        super().train(mode)
        for layer in self.layers:
            if self.norm_eval and isinstance(layer, self.kinds):
                layer.eval()
        return self


class Net(nn.Module):
    def __init__(self, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def warnings_of(model, images=5, hooks=('SSNRadiusHook',), config=None, optimizers=()):
    return list(start_check.training_warnings(model, images, hooks, config or {}, optimizers))


def test_norm_eval_that_holds_undecided_layers():
    model = Net(backbone=Backbone(True, True)).eval()
    (warning,) = warnings_of(model)
    assert warning.startswith('2 undecided SSN layers take running statistics while they learn')
    assert 'backbone.layers (2): set norm_eval=False' in warning


def test_norm_eval_that_does_not_reach_ssn():
    (warning,) = warnings_of(Net(backbone=Backbone(True, False)))
    assert warning.startswith('norm_eval=True of backbone reaches BatchNorm alone, so 2 SSN')
    assert "type='SSNResNet'" in warning
    assert not warnings_of(Net(backbone=Backbone(False, False)))


def test_a_decided_backbone_may_be_held():
    model = Net(backbone=Backbone(True, True))
    set_radius(model, 1.0)
    assert not warnings_of(model, images=1, hooks=())


@pytest.mark.parametrize(
    ('images', 'normalizers', 'radius', 'told'),
    [
        (4, ('IN', 'LN', 'BN'), 0.0, 1),
        (1, ('IN', 'LN', 'BN'), 0.0, 1),
        (5, ('IN', 'LN', 'BN'), 0.0, 0),
        (None, ('IN', 'LN', 'BN'), 0.0, 0),  # a loader with batches of its own
        (1, ('LN', 'GN', 'BN'), 0.0, 0),
        (2, ('IN', 'LN', 'BN'), 1.0, 0),  # decided, as a released file is
    ],
)
def test_few_images(images, normalizers, radius, told):
    model = nn.Sequential(SSN(4, normalizers=normalizers))
    set_radius(model, radius)
    lines = warnings_of(model, images)
    assert len(lines) == told
    if told:
        assert lines[0].startswith(f'images per process: {images}, and 1 SSN layers')
        assert 'end=0.3' in lines[0]


def test_one_image_where_processes_share_their_statistics(monkeypatch):
    model = Net(a=SyncSSN(4))
    assert warnings_of(model, images=1)
    monkeypatch.setattr(start_check, 'get_world_size', lambda: 2)
    assert not warnings_of(model, images=1)
    assert warnings_of(Net(a=SSN(4)), images=1)


def test_one_image_and_layers_that_have_selected_bn():
    model = Net(backbone=Backbone(False, True))
    with torch.no_grad():
        model.backbone.layers[0].mean_weight[2] = 1
        model.backbone.layers[1].mean_weight[0] = 1
        model.backbone.layers[1].var_weight[0] = 1
        model.backbone.layers[0].var_weight[0] = 1
    set_radius(model, 1.0)
    (warning,) = warnings_of(model, images=1)
    assert warning.startswith('1 image per process, and 1 SSN layers have selected BN')
    assert 'norm_eval=True' in warning
    model.backbone.norm_eval = True
    assert not warnings_of(model, images=1)


def test_control_parameters_of_sn_too():
    model = Net(a=SN(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    (warning,) = warnings_of(model, optimizers=[optimizer])
    assert 'the weight decay 0.5' in warning
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (warning,) = warnings_of(model, config=dict(optim_wrapper={}), optimizers=[optimizer])
    assert 'the learning rate' in warning
    config = dict(optim_wrapper=dict(constructor='MyConstructor'))
    assert not warnings_of(model, config=config, optimizers=[optimizer])


# As the child of a config whose model has SyncBN in all places.
MODEL = dict(
    type='EncoderDecoder',
    backbone=dict(type='ResNetV1c', norm_cfg=dict(type='SyncBN')),
    decode_head=dict(type='ASPPHead', norm_cfg=dict(type='SyncBN')),
    auxiliary_head=[dict(type='FCNHead', norm_cfg=dict(type='SyncBN'))],
)


@pytest.mark.parametrize(
    ('entries', 'asked'),
    [
        (dict(norm_cfg=dict(type='SSN')), 'norm_cfg is SSN'),
        (dict(norm_cfg=dict(type='SyncSSN')), 'norm_cfg is SyncSSN'),
        (dict(custom_hooks=[dict(type='SSNRadiusHook')]), 'custom_hooks has SSNRadiusHook'),
    ],
)
def test_ssn_asked_for_and_none_there(entries, asked):
    config = ConfigDict(model=MODEL, **entries)
    with pytest.raises(InputError) as caught:
        start_check.check_norms_asked_for(nn.BatchNorm2d(4), config)
    text = str(caught.value)
    assert text.startswith(f'model: has no SSN layer, although {asked}: ')
    for place in ('backbone', 'decode_head', 'auxiliary_head.0'):
        assert f'model.{place}.norm_cfg is SyncBN' in text
    assert '--cfg-options model.backbone.norm_cfg.type=SSN' in text
    assert '\n' not in text
    start_check.check_norms_asked_for(SN(4), config)
    config.model.type = 'CollapsedSSN'
    start_check.check_norms_asked_for(nn.BatchNorm2d(4), config)


def test_no_ssn_asked_for_and_none_there():
    start_check.check_norms_asked_for(nn.BatchNorm2d(4), dict(model=MODEL))


def test_ssn_asked_for_stops_a_training(make_runner):
    model = dict(type='ToyNet', norm_cfg=dict(type='BN'))
    runner = make_runner(hooks=HOOKS, model=model)
    runner.cfg.update(custom_hooks=list(HOOKS), model=model)
    with pytest.raises(InputError, match='has no SSN layer'):
        runner.train()
    assert runner.iter == 0


class ToyHead(nn.Module):
    ignore_index = 255

    def __init__(self, num_classes, **attributes) -> None:
        super().__init__()
        self.num_classes = num_classes
        vars(self).update(attributes)


class RPNHead(ToyHead):
    pass


def test_more_classes_than_a_head_has():
    model = Net(rpn_head=RPNHead(1), roi_head=Net(bbox_head=nn.ModuleList([ToyHead(3)])))
    start_check.check_classes(model, None)
    start_check.check_classes(model, ('a', 'b', 'c'))
    with pytest.raises(InputError, match=r'roi_head\.bbox_head\.0\.num_classes: got 3, .*least 4'):
        start_check.check_classes(model, ('a', 'b', 'c', 'd'))


def segmentation(*labels) -> object:
    from mmengine.structures import BaseDataElement, PixelData

    sample = BaseDataElement(metainfo=dict(img_path='a/b.png'))
    sample.gt_sem_seg = PixelData(data=torch.tensor(labels).reshape(1, 1, -1))
    return sample


def detection(*labels) -> object:
    from mmengine.structures import BaseDataElement, InstanceData

    sample = BaseDataElement(metainfo=dict(img_path='a/b.png'))
    sample.gt_instances = InstanceData(labels=torch.tensor(labels, dtype=torch.long))
    return sample


def classification(label) -> object:
    from mmengine.structures import BaseDataElement

    return BaseDataElement(metainfo=dict(img_path='a/b.png'), gt_label=torch.tensor([label]))


@pytest.mark.parametrize('make', [segmentation, detection, classification])
def test_labels_beyond_the_classes(make):
    model = Net(rpn_head=RPNHead(1), decode_head=ToyHead(19))
    start_check.check_labels(model, dict(data_samples=[make(18), make(255), make(0)]))
    with pytest.raises(InputError, match=r'decode_head\.num_classes: got 19, .*b\.png .*label 25'):
        start_check.check_labels(model, dict(data_samples=[make(18), make(25)]))


def test_labels_that_are_nobodys_business():
    two = Net(decode_head=ToyHead(1, out_channels=1))
    start_check.check_labels(two, dict(data_samples=[segmentation(0, 1, 255)]))
    with pytest.raises(InputError):
        start_check.check_labels(two, dict(data_samples=[segmentation(0, 2)]))
    head = Net(head=ToyHead(3))
    for batch in ([], dict(data_samples=torch.ones(2)), dict(data_samples=[detection()]), {}):
        start_check.check_labels(head, batch)


def test_labels_stop_a_training_at_its_first_step(make_runner):
    class HeadNet(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.decode_head = ToyHead(3)
            self.norm = SSN(2)

        def forward(self, inputs, data_samples=None, mode='tensor'):
            raise AssertionError('not reached')

    runner = make_runner(
        hooks=HOOKS,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        model=HeadNet(),
        train_dataloader=single_images(lambda batch: dict(data_samples=[segmentation(3)])),
    )
    with pytest.raises(InputError, match='label 3'):
        runner.train()
