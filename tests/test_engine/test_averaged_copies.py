"""Radius and choices in every copy of a model that averages it, and in nothing else."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel, ExponentialMovingAverage, MMDistributedDataParallel
from mmengine.registry import MODELS
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ssn_plugin import SSN, SyncSSN, set_radius, undecided_layers

RADIUS = dict(type='SSNRadiusHook', end=0.5)
STEEP = dict(  # layers decide one after the other, and not alike
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9),
    constructor='SSNOptimWrapperConstructor',
    paramwise_cfg=dict(ssn_lr_mult=30.0),
)


def check_follows(copied: nn.Module, model: nn.Module) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, SSN)]
    followers = [layer for layer in copied.modules() if isinstance(layer, SSN)]
    assert len(layers) == len(followers) > 0
    for layer, follower in zip(layers, followers, strict=True):
        assert follower.selected == layer.selected
        assert None not in layer.selected
        for name in ('radius', 'mean_fixed', 'var_fixed', 'mean_choice', 'var_choice'):
            assert torch.equal(getattr(follower, name), getattr(layer, name)), name


class Averaging(Hook):
    """What a user writes around torch's AveragedModel, from some iteration on."""

    priority = 'NORMAL'

    def __init__(self, attribute='ema_model', begin=0, wrap=lambda average: average, **kwargs):
        self.attribute, self.begin, self.wrap, self.kwargs = attribute, begin, wrap, kwargs

    def before_train(self, runner):
        if self.begin == 0:
            self.make(runner)

    def make(self, runner):
        self.averaged = AveragedModel(runner.model, **self.kwargs)
        setattr(self, self.attribute, self.wrap(self.averaged))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.begin:
            self.make(runner)
        if hasattr(self, 'averaged'):
            self.averaged.update_parameters(runner.model)


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
@pytest.mark.parametrize(
    'arguments',
    [
        dict(),
        dict(attribute='swa_model'),
        dict(wrap=lambda average: [average]),
        dict(wrap=lambda average: dict(slow=average)),
        dict(use_buffers=True),
        dict(begin=4),
        dict(begin=9),
    ],
    ids=['ema_model', 'another_name', 'list', 'dict', 'buffers', 'later', 'after_all_decided'],
)
def test_torch_averages_held_by_a_hook(make_runner, by_epoch, arguments):
    runner = make_runner(by_epoch, hooks=[RADIUS], optim_wrapper=STEEP, validate=True)
    runner.register_hook(averaging := Averaging(**arguments))
    runner.train()
    check_follows(averaging.averaged, runner.model)


def test_with_precise_statistics(make_runner):
    precise = dict(type='PreciseStatsHook', num_batches=2)
    runner = make_runner(True, hooks=[RADIUS, precise], validate=True)
    runner.register_hook(averaging := Averaging())
    runner.train()
    check_follows(averaging.averaged, runner.model)
    statistics = averaging.averaged.module.norm1.running_mean
    assert statistics.abs().max() > 0
    assert not torch.equal(statistics, runner.model.norm1.running_mean)


def test_two_averages_at_once(make_runner):
    hooks = [
        RADIUS,
        dict(type='EMAHook', momentum=0.05),
        dict(type='EMAHook', ema_type='StochasticWeightAverage', update_buffers=True),
    ]
    runner = make_runner(hooks=hooks, optim_wrapper=STEEP)
    runner.train()
    averages = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
    assert len(averages) == 2
    for averaged in averages:
        check_follows(averaged, runner.model)


def test_an_average_of_a_wrapped_model(make_runner):
    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = MODELS.build(dict(type='ToyNet', norm_cfg=dict(type='SyncSSN')))
        wrapped = MMDistributedDataParallel(model, device_ids=None)
        runner = make_runner(model=wrapped, hooks=[RADIUS, dict(type='EMAHook', momentum=0.05)])
        runner.register_hook(averaging := Averaging())
        runner.train()
        assert isinstance(averaging.averaged.module.module.norm1, SyncSSN)
        check_follows(averaging.averaged, model)
    finally:
        torch.distributed.destroy_process_group()


class Student(BaseModel):
    """A student and a teacher of one structure, as SemiBaseDetector has them."""

    def __init__(self, same=True, teacher='teacher', container=None):
        super().__init__()
        self.student, self.name = MODELS.build(dict(type='ToyNet')), teacher
        copied = copy.deepcopy(self.student) if same else MODELS.build(dict(type='ToyNet'))
        copied.requires_grad_(False)
        setattr(self, teacher, copied if container is None else container([copied]))
        self.containers = container is not None

    @property
    def copied(self):
        return getattr(self, self.name)[0] if self.containers else getattr(self, self.name)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        with torch.no_grad():
            self.copied.eval()
            targets = self.copied(inputs)
        if mode == 'loss':
            losses = self.student(inputs, data_samples, mode)
            return losses | dict(loss_teacher=(self.student(inputs) - targets).square().mean())
        return targets


class MeanTeacher(Hook):
    """Moves the teacher as mmdet's MeanTeacherHook does, parameters alone."""

    priority = 'NORMAL'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = runner.model
        for ours, theirs in zip(model.copied.parameters(), model.student.parameters(), strict=True):
            ours.data.mul_(0.9).add_(theirs.data, alpha=0.1)


@pytest.fixture(autouse=True)
def _student():
    for model in (Student, Contrast, Twins):
        MODELS.register_module(module=model, force=True)
    yield
    for model in (Student, Contrast, Twins):
        MODELS.module_dict.pop(model.__name__)


@pytest.mark.parametrize(
    'arguments',
    [
        dict(),
        dict(teacher='slow'),
        dict(teacher='teachers', container=nn.ModuleList),
        dict(teacher='chain', container=lambda modules: nn.Sequential(*modules)),
    ],
    ids=['teacher', 'another_name', 'list', 'sequence'],
)
def test_a_teacher_within_the_model(make_runner, arguments):
    runner = make_runner(
        model=dict(type='Student', **arguments),
        hooks=[RADIUS, dict(type='SSNRatioHook', interval=1, report=False)],
        optim_wrapper=STEEP,
    )
    runner.register_hook(MeanTeacher())
    runner.train()
    check_follows(runner.model.copied, runner.model.student)
    assert undecided_layers(runner.model) == []
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert 'frozen parameters' not in log


@pytest.mark.parametrize('done', [2, 7])
def test_a_teacher_in_a_resumed_run(make_runner, done):
    """By then it differs from the student, so that only the checkpoint knows."""
    settings = dict(
        model=dict(type='Student'),
        hooks=[RADIUS, dict(type='SSNResumeHook')],
        optim_wrapper=STEEP,
    )
    straight = make_runner(**settings)
    straight.register_hook(MeanTeacher())
    straight.train()
    file = Path(straight.work_dir, f'iter_{done}.pth')
    meta = torch.load(file, weights_only=False)['meta']
    assert meta['averaged_copies'] == ['teacher']
    resumed = make_runner(**settings, load_from=str(file), resume=True)
    resumed.register_hook(MeanTeacher())
    resumed.train()
    check_follows(resumed.model.teacher, resumed.model.student)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_teacher_that_does_not_learn_keeps_its_choices(make_runner):
    """Distillation: of the same structure, pretrained, decided."""
    runner = make_runner(model=dict(type='Student', same=False), hooks=[RADIUS])
    teacher = runner.model.teacher
    teacher.requires_grad_(True)
    with torch.no_grad():
        teacher.norm1.mean_weight[0] = 2
    set_radius(teacher, 0.9)
    teacher.requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    runner.train()
    assert teacher.norm1.selected == ('IN', 'BN')
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


class Twins(BaseModel):
    """Blocks of one structure in a row, the first frozen, as a frozen stage is."""

    def __init__(self, convs=True):
        super().__init__()

        def block():
            return nn.Sequential(nn.Conv2d(2, 2, 3), SSN(2)) if convs else SSN(2)

        self.stages = nn.Sequential(block(), block(), block())
        self.stages[0].requires_grad_(False)
        self.head = nn.Linear(2, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        outputs = self.head(self.stages(inputs).square().mean((2, 3)))[:, 0]
        return dict(loss=(outputs - data_samples).square().mean()) if mode == 'loss' else outputs


@pytest.mark.parametrize('convs', [True, False])
def test_a_frozen_stage_is_no_copy(make_runner, convs):
    runner = make_runner(model=dict(type='Twins', convs=convs), hooks=[RADIUS])
    runner.train()
    first, *others = (m for m in runner.model.modules() if isinstance(m, SSN))
    assert first.radius.item() == 0
    assert first.selected == (None, None)
    assert all(None not in layer.selected for layer in others)


class Contrast(BaseModel):
    """An average of some parts in a row, under names of its own, as mmpretrain's MoCo has it."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(2, 4, 3), SSN(4), nn.ReLU())
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 3), SSN(4))
        self.key = ExponentialMovingAverage(nn.Sequential(self.backbone, self.neck), 0.1)
        self.head = nn.Linear(4, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        outputs = self.head(self.neck(self.backbone(inputs)).square().mean((2, 3)))[:, 0]
        if mode == 'loss':
            self.key.update_parameters(nn.Sequential(self.backbone, self.neck))
            distance = (self.key(inputs) - self.neck(self.backbone(inputs))).square().mean()
            return dict(loss=(outputs - data_samples).square().mean() + distance)
        return outputs


def test_an_average_of_parts_within_the_model(make_runner):
    runner = make_runner(model=dict(type='Contrast'), hooks=[RADIUS], optim_wrapper=STEEP)
    runner.train()
    check_follows(runner.model.key, nn.Sequential(runner.model.backbone, runner.model.neck))
    assert undecided_layers(runner.model) == []


def test_no_cost_without_copies(make_runner, monkeypatch):
    """A model without copies is looked at once."""
    from ssn_plugin.engine import averaged_copies

    looks = []
    original = averaged_copies._parts_without_gradient
    monkeypatch.setattr(
        averaged_copies,
        '_parts_without_gradient',
        lambda model, name='': looks.append(name) or original(model, name),
    )
    runner = make_runner(hooks=[RADIUS])
    runner.train()
    assert looks.count('') == 1


@pytest.mark.parametrize('skip_buffer', [True, False])
def test_the_teacher_of_mmdet(make_runner, skip_buffer):
    pytest.importorskip('mmdet')
    from mmdet.engine.hooks import MeanTeacherHook

    runner = make_runner(model=dict(type='Student'), hooks=[RADIUS], optim_wrapper=STEEP)
    runner.register_hook(MeanTeacherHook(momentum=0.1, skip_buffer=skip_buffer))
    runner.train()
    check_follows(runner.model.teacher, runner.model.student)
    teacher = runner.model.teacher
    state = teacher.state_dict()
    for layer in ('norm1', 'norm2'):
        for statistic in ('mean', 'var'):
            assert sorted(state[f'{layer}.{statistic}_weight'].tolist()) == [0, 0, 1]
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert log.count('teacher: nobody averages its running statistics') == skip_buffer
