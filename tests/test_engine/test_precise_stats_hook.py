"""PreciseStatsHook: equal to the average by brute force, and training does not notice it."""

import contextlib
import copy
import math
import random
from itertools import islice
from pathlib import Path

import numpy as np
import precise_stats_ranks
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor, BaseModel, ExponentialMovingAverage
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import DATASETS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from processes import run_processes
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from demo_data import make_demo_dataset
from ssn_plugin import SN, SSN, SelectedNorm, replace_statistics, set_radius
from ssn_plugin.engine.hooks.precise_stats_hook import (
    PreciseStatsHook,
    _full_batches,
    _loader_like,
)
from ssn_plugin.engine.randomness import preserved_generators, seed_iteration

ROOT = Path(__file__).parents[2]
BATCHES = [torch.randn(n, 2, 7, 9) * (n + 1) + n for n in (3, 4, 2, 5)]


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (SSN, SN, nn.modules.batchnorm._BatchNorm)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def brute_force(model: nn.Module, batches, forward=None) -> dict[str, torch.Tensor]:
    """Averages of the means and unbiased variances of what comes into every norm."""
    model = copy.deepcopy(model).train()
    inputs = {name: [] for name in norms_of(model)}
    for name, norm in norms_of(model).items():
        norm.register_forward_pre_hook(lambda _, args, n=name: inputs[n].append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            (forward or (lambda m, b: m(b)))(model, batch)
    found = {}
    for name, values in inputs.items():
        rows = [x.transpose(0, 1).flatten(1) for x in values if x.numel()]
        found[f'{name}.running_mean'] = torch.stack([r.mean(1) for r in rows]).mean(0)
        found[f'{name}.running_var'] = torch.stack([r.var(1) for r in rows]).mean(0)
    return found


def check_statistics(model: nn.Module, expected: dict[str, torch.Tensor], names=None) -> None:
    for name in names or norms_of(model):
        for kind in ('running_mean', 'running_var'):
            key = f'{name}.{kind}'
            torch.testing.assert_close(
                model.get_buffer(key), expected[key].float(), rtol=1e-5, atol=1e-6
            )


class Shared(nn.Module):
    """A norm used twice in one pass, one norm of every kind, one of them held in evaluation."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1)
        self.ssn, self.sn, self.bn = SSN(4, momentum=0.003), SN(4), nn.BatchNorm2d(4, momentum=None)

    def train(self, mode=True):
        super().train(mode)
        self.sn.eval()
        return self

    def forward(self, x):
        x = self.ssn(self.conv(x)).relu()
        return self.bn(self.ssn(self.sn(self.head(x))))


@pytest.mark.parametrize('radius', [0.0, 0.5, 1.0])
def test_equal_to_brute_force(radius):
    model = Shared().train()
    set_radius(model, radius)
    for batch in BATCHES:  # statistics of a training
        model(batch)
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    replaced, unused = replace_statistics(model, model, BATCHES)
    assert len(replaced) == 4
    assert unused == []
    check_statistics(model, brute_force(before, BATCHES), ['ssn', 'bn'])
    assert (model.training, model.sn.training, model.bn.training) == (True, False, True)
    assert (model.ssn.momentum, model.bn.momentum) == (0.003, None)
    assert torch.equal(torch.get_rng_state(), state)
    # And nothing else, that of the layer in evaluation mode included.
    for name, value in before.state_dict().items():
        if name.split('.')[0] == 'sn' or 'running' not in name:
            assert torch.equal(model.state_dict()[name], value), name
    for buffer, value in replaced.items():
        buffer.copy_(value)
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize('choice', ['IN', 'LN', 'BN'])
def test_layers_that_did_not_choose_bn_are_left_out(choice):
    layer = SSN(2)
    with torch.no_grad():
        for control in (layer.mean_weight, layer.var_weight):
            control[layer.normalizers.index(choice)] = 1
    set_radius(layer, 1.0)
    before = layer.state_dict()['running_var'].clone()
    replaced, _ = replace_statistics(layer, layer, BATCHES)
    assert bool(replaced) == (choice == 'BN')
    assert torch.equal(layer.running_var, before) == (choice != 'BN')
    without = SSN(2, normalizers=('IN', 'LN'))
    assert replace_statistics(without, without, BATCHES) == ({}, [])


def test_bn_of_the_variance_alone_takes_part():
    layer = SSN(2)
    with torch.no_grad():
        layer.mean_weight[0] = layer.var_weight[2] = 1
    set_radius(layer, 1.0)
    assert layer.selected == ('IN', 'BN')
    assert len(replace_statistics(layer, layer, BATCHES)[0]) == 2
    check_statistics(nn.Sequential(layer), brute_force(nn.Sequential(layer), BATCHES))


@pytest.mark.parametrize('kind', [SSN, SN, nn.BatchNorm2d])
@pytest.mark.parametrize(
    'bad', [torch.empty(0, 2, 3, 3), torch.full((2, 2, 3, 3), math.nan), torch.ones(2, 2, 3, 3) / 0]
)
def test_batches_that_are_empty_or_not_finite_do_not_count(kind, bad):
    model = nn.Sequential(kind(2))
    expected = brute_force(model, BATCHES)
    replace_statistics(model, model, [bad, *BATCHES[:2], bad, *BATCHES[2:]])
    check_statistics(model, expected)
    before = copy.deepcopy(model)
    replaced, unused = replace_statistics(model, model, [bad, bad])
    assert replaced == {}
    assert unused == ['0']
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_failing_forward_leaves_the_model_as_it_was():
    model = Shared()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError):
        replace_statistics(model, model, [BATCHES[0], torch.randn(2, 3, 7, 7)])
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert (model.ssn.momentum, model.bn.momentum) == (0.003, None)
    assert not any(module._forward_hooks for module in model.modules())


def test_average_over_two_processes(tmp_path):
    ours, other = run_processes(precise_stats_ranks.averages, 2, tmp_path)
    model = precise_stats_ranks.network()
    both = precise_stats_ranks.batches_of(0) + precise_stats_ranks.batches_of(1)
    expected = list(brute_force(model, both).values())
    for mine, theirs, values in zip(ours, other, expected, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, values.float(), rtol=1e-5, atol=1e-6)


def test_average_of_layers_that_share_every_batch(tmp_path):
    ours, other = run_processes(precise_stats_ranks.synchronised_averages, 2, tmp_path)
    joined = [
        torch.cat(shares)
        for shares in zip(*map(precise_stats_ranks.shares_of, (0, 1)), strict=True)
    ]
    # NaN: not counted. Both processes count the others, but the last, which is of one alone.
    batches = [joined[0], *joined[2:4]] * 2 + joined[4:]
    expected = list(brute_force(precise_stats_ranks.network(), batches).values())
    for mine, theirs, values in zip(ours, other, expected, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, values.float(), rtol=1e-5, atol=1e-6)


def test_an_averaged_model_of_torch():
    """Whose own ``update_bn`` knows no layer but BatchNorm, and says nothing."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), SSN(4), nn.Conv2d(4, 3, 1), SN(3))
    averaged = AveragedModel(model)
    for batch in BATCHES[:2]:
        model(batch).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        averaged.update_parameters(model)
    before = copy.deepcopy(averaged)
    update_bn(BATCHES, averaged)
    for name, value in before.state_dict().items():
        assert torch.equal(averaged.state_dict()[name], value), name
    replace_statistics(averaged, averaged, BATCHES)
    check_statistics(averaged, brute_force(before, BATCHES))
    for name, value in before.named_parameters():
        assert torch.equal(averaged.get_parameter(name), value), name


# ---------------------------------------------------------------- in a run

RADIUS = dict(type='SSNRadiusHook')
PRECISE = dict(type='PreciseStatsHook', num_batches=3)
EMA = dict(type='EMAHook', momentum=0.05)


def expected_of(runner, model, iteration: int) -> dict[str, torch.Tensor]:
    loader = _loader_like(runner.train_dataloader, runner.seed, iteration)
    batches = [batch for batch, _ in zip(loader, range(3), strict=False)]
    return brute_force(model, batches, lambda m, b: m(b['inputs']))


class Watch(Hook):
    """Notes model and statistics as a validation sees them, and as it leaves them."""

    priority = 'LOWEST'

    def __init__(self):
        self.seen = []

    def before_val_epoch(self, runner):
        self.seen.append((runner.iter, copy.deepcopy(runner.model)))


class Around(Hook):
    """Notes all buffers before anybody does something for a validation, and after it."""

    def __init__(self, priority, notes, moment):
        self.priority, self.notes, self.moment = priority, notes, moment

    def _note(self, runner):
        models = [runner.model]
        models += [hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model')]
        self.notes.append([value.clone() for model in models for value in model.buffers()])

    def before_val(self, runner):
        if self.moment == 'before':
            self._note(runner)

    def after_val(self, runner):
        if self.moment == 'after':
            self._note(runner)


@pytest.mark.parametrize(
    'ema', [None, EMA, dict(EMA, update_buffers=True)], ids=['plain', 'ema', 'ema_buffers']
)
@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_validation_and_last_checkpoint_have_the_averages(make_runner, by_epoch, ema):
    settings = dict(validate=True)
    settings['default_hooks'] = dict(
        checkpoint=dict(type='CheckpointHook', by_epoch=by_epoch, save_best='size', rule='less')
    )
    if not by_epoch:
        settings['train_cfg'] = dict(by_epoch=False, max_iters=12, val_interval=4)
    hooks = [RADIUS, *([] if ema is None else [ema])]
    plain = make_runner(by_epoch, hooks=hooks, **settings)
    plain.train()
    runner = make_runner(by_epoch, hooks=[PRECISE, *hooks], **settings)
    runner.register_hook(watch := Watch())
    before, after = [], []
    runner.register_hook(Around('VERY_HIGH', before, 'before'))
    runner.register_hook(Around('LOWEST', after, 'after'))
    runner.train()
    # Every validation, and the last checkpoint.
    assert [iteration for iteration, _ in watch.seen] == [4, 8, 12]
    for iteration, model in watch.seen[:2]:
        check_statistics(model, expected_of(runner, model, iteration))
    last = watch.seen[2][1]
    check_statistics(last, expected_of(runner, last, 11))
    file = Path(runner.work_dir, 'epoch_3.pth' if by_epoch else 'iter_12.pth')
    saved = torch.load(file, weights_only=False)['state_dict']
    for name, value in last.state_dict().items():
        assert torch.equal(saved[name], value), name
    # The best one is that of the first validation.
    best = next(Path(runner.work_dir).glob('best*'))
    saved = torch.load(best, weights_only=False)['state_dict']
    for name, value in watch.seen[0][1].state_dict().items():
        assert torch.equal(saved[name], value), name
    # Training did not notice: statistics come back, and all weights are those of a run without.
    for ours, theirs in zip(before, after, strict=True):
        assert all(map(torch.equal, ours, theirs))
    for (name, ours), theirs in zip(
        runner.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs) == ('running' not in name), name


class Disturbed(Dataset):
    """A toy data set, every image with noise of its own."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = self.images[index]
        return dict(item, inputs=item['inputs'] + torch.randn_like(item['inputs']))


def test_training_goes_on_to_draw_its_noise(make_runner):
    """Without SSNResumeHook too: how this hook seeds its samples is its own business."""
    weights = []
    for hooks in ([RADIUS], [RADIUS, PRECISE]):
        dataset = Disturbed(DATASETS.build(dict(type='ToyImages')))
        loader = DataLoader(dataset, 3, sampler=InfiniteSampler(dataset, seed=0))
        settings = dict(train_cfg=dict(by_epoch=False, max_iters=12, val_interval=4))
        runner = make_runner(hooks=hooks, train_dataloader=loader, validate=True, **settings)
        runner.train()
        weights.append(dict(runner.model.named_parameters()))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


class Shapes(Dataset):
    """Wide and high images in an order without order."""

    def __init__(self, size):
        self.wide = torch.rand(size) < 0.5

    def __len__(self):
        return len(self.wide)

    def __getitem__(self, index):
        return self.wide[index]

    def get_data_info(self, index):
        return dict(width=1 + int(self.wide[index]), height=2 - int(self.wide[index]))


@pytest.mark.parametrize('batch_size', [1, 2, 3, 5])
def test_every_process_has_as_many_batches(batch_size):
    """However the images of each fall into mmdet's groups of like shape; SyncSSN would wait."""
    pytest.importorskip('mmdet')
    from mmdet.datasets.samplers import AspectRatioBatchSampler

    for size in range(1, 25):
        dataset = Shapes(size)
        batches = AspectRatioBatchSampler(DefaultSampler(dataset, seed=0), batch_size)
        loader = _loader_like(DataLoader(dataset, batch_sampler=batches), size, 0)
        count = _full_batches(loader)
        assert count == max(size // batch_size, 1)  # nothing of this depends on shapes
        found = [len(batch) for batch in islice(loader, count)]
        assert found == [min(batch_size, size)] * count


def test_more_batches_than_there_are(make_runner):
    hook = dict(type='PreciseStatsHook', num_batches=1000)
    runner = make_runner(hooks=[RADIUS, hook])
    runner.train()
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert 'PreciseStatsHook: 2 layers, 4 batches' in log


def test_validation_outside_of_training_is_left_alone(make_runner):
    runner = make_runner(hooks=[RADIUS, PRECISE], validate=True)
    before = copy.deepcopy(runner.model.state_dict())
    runner.val()
    assert all(torch.equal(runner.model.state_dict()[name], v) for name, v in before.items())


def test_data_without_indices(make_runner):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    runner = make_runner(hooks=[RADIUS, PRECISE], train_dataloader=DataLoader(Stream(), None))
    with pytest.raises(ValueError, match='train_dataloader: got a Stream without a batch sampler'):
        runner.train()


def test_batches_of_several_sizes(make_runner):
    pytest.importorskip('mmdet')
    from mmdet.datasets.samplers import MultiDataAspectRatioBatchSampler

    dataset = DATASETS.build(dict(type='ToyImages'))
    batches = MultiDataAspectRatioBatchSampler(DefaultSampler(dataset), [2, 1], num_datasets=2)
    loader = DataLoader(dataset, batch_sampler=batches)
    runner = make_runner(hooks=[RADIUS, PRECISE], train_dataloader=loader)
    with pytest.raises(ValueError, match=r'with the batch sizes \[2, 1\], expected one batch size'):
        runner.train()


@pytest.mark.parametrize('num_batches', [0, -1, 1.5, True, '3'])
def test_bad_number(num_batches):
    with pytest.raises(ValueError, match=r'num_batches: got .*, expected a positive integer'):
        PreciseStatsHook(num_batches)


@OPTIM_WRAPPERS.register_module(force=True)
class Bfloat16(OptimWrapper):
    """What AmpOptimWrapper does on a GPU."""

    @contextlib.contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def test_the_precision_is_that_of_training(make_runner):
    wrapper = dict(type='Bfloat16', optimizer=dict(type='SGD', lr=0.01))
    runner = make_runner(hooks=[RADIUS, PRECISE], optim_wrapper=wrapper)
    seen = []
    norm = runner.model.norm1
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    runner.train()
    assert seen == [torch.bfloat16] * (12 + 3)


class Independent(Hook):
    """Computes averages before a validation, and what is predicted with them and without."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.predictions = []

    def before_val(self, runner):
        self.last = runner.iter == runner.max_iters
        if self.last:
            return  # the averages are there already
        self.trained, self.precise = copy.deepcopy(runner.model), copy.deepcopy(runner.model)
        model = self.precise = copy.deepcopy(runner.model)
        loader = _loader_like(runner.train_dataloader, runner.seed, runner.iter)
        inputs = []

        def forward(model, batch):
            data = model.data_preprocessor(batch, True)
            inputs.append(data['inputs'].double())
            model(**data, mode='loss')

        with preserved_generators():
            seed_iteration(runner.seed, runner.iter)
            self.expected = brute_force(model, islice(loader, PRECISE['num_batches']), forward)
        assert len(inputs) == PRECISE['num_batches']
        # The first layer once more from the images on, in float64.
        conv = copy.deepcopy(model.backbone.conv1).double()
        self.rows = [conv(images).detach().transpose(0, 1).flatten(1) for images in inputs]
        for name, value in self.expected.items():
            model.get_buffer(name).copy_(value)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.last:
            return
        self.seen = copy.deepcopy(runner.model)
        others = [
            model.eval().val_step(copy.deepcopy(data_batch))
            for model in (self.precise, self.trained)
        ]
        for samples in zip(outputs, *others, strict=True):
            self.predictions.append([sample.pred_instances.scores for sample in samples])


@pytest.mark.slow
def test_a_detector_is_validated_with_averages(make_runner, tmp_path):
    pytest.importorskip('mmdet')
    make_demo_dataset(tmp_path / 'data/demo', num_train=8, num_val=2)
    config = Config.fromfile(ROOT / 'configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py')
    config.work_dir = str(tmp_path / 'run')
    config.train_cfg.update(max_iters=3, val_interval=2)
    metric = config.val_evaluator
    metric.ann_file = str(tmp_path / metric.ann_file)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(tmp_path / loader.dataset.data_root)
    config.test_dataloader = config.test_evaluator = config.test_cfg = None
    config.custom_hooks = [dict(type='SSNRadiusHook', end_radius=0.3), PRECISE]
    config.model.test_cfg.rcnn.score_thr = 0.0  # hardly anything is found after four iterations
    runner = Runner.from_cfg(config)
    runner.register_hook(hook := Independent())
    runner.train()
    check_statistics(hook.seen, hook.expected)
    layer = hook.seen.backbone.sn1
    mean = torch.stack([rows.mean(1) for rows in hook.rows]).mean(0).float()
    var = torch.stack([rows.var(1) for rows in hook.rows]).mean(0).float()
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-5, atol=1e-6)
    assert len(hook.predictions) == 2
    for found, with_them, without in hook.predictions:
        assert len(found) > 0
        torch.testing.assert_close(found, with_them, rtol=1e-4, atol=1e-5)
        assert len(without) != len(found) or (without - found).abs().max() > 1e-3


# ---------------------------------------------------------------- what training must not notice


class Moving(BaseModel):
    """Whose forward pass changes all that is not a weight: buffers, Python state, parts, input."""

    def __init__(self):
        super().__init__(data_preprocessor=dict(type='Resizing'))
        self.net = MODELS.build(dict(type='ToyNet'))
        self.register_buffer('bases', torch.zeros(2))
        self.key = ExponentialMovingAverage(self.net.head, momentum=0.5)
        self.threshold, self.history = 0.5, []

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if self.training:
            self.bases = 0.9 * self.bases + inputs.mean((0, 2, 3))  # another tensor, as in EMAHead
            self.threshold *= 1.1  # as in Dynamic R-CNN
            self.history.append(float(inputs.mean()))
            self.last = self.net.head.weight * 2  # with a graph, which torch refuses to copy
            self.key.update_parameters(self.net.head)
        return self.net(inputs, data_samples, mode)


class Resizing(BaseDataPreprocessor):
    """As mmdet's BatchSyncRandomResize: counts, and its next size depends on it."""

    def __init__(self):
        super().__init__()
        self.size = 8

    def forward(self, data, training=False):
        data = super().forward(data, training)
        if training:
            self.size = 6 + (self.size + 1) % 4
            data['inputs'] = data['inputs'][..., : self.size, : self.size]
        return data


@pytest.fixture
def _moving():
    for model in (Moving, Resizing):
        MODELS.register_module(module=model, force=True)
    yield
    for model in (Moving, Resizing):
        MODELS.module_dict.pop(model.__name__)


@pytest.mark.usefixtures('_moving')
@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_nothing_of_a_model_or_its_preprocessor_moves(make_runner, by_epoch):
    settings = dict(validate=True, model=dict(type='Moving'))
    if not by_epoch:
        settings['train_cfg'] = dict(by_epoch=False, max_iters=12, val_interval=4)
    runs = []
    for hooks in ([RADIUS], [RADIUS, PRECISE]):
        runs.append(make_runner(by_epoch, hooks=hooks, **copy.deepcopy(settings)))
        runs[-1].train()
    plain, ours = (runner.model for runner in runs)
    for (name, value), expected in zip(
        ours.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected) == ('running' not in name), name
    assert (ours.threshold, ours.history) == (plain.threshold, plain.history)
    assert ours.data_preprocessor.size == plain.data_preprocessor.size
    log = next(Path(runs[1].work_dir).glob('*/*.log')).read_text()
    assert log.count('PreciseStatsHook: 2 layers, 3 batches') == 3
    assert 'cannot be copied' not in log


def test_a_buffer_that_is_replaced_by_another():
    class Bases(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = SSN(2)
            self.register_buffer('bases', torch.zeros(2))

        def forward(self, x):
            self.bases = 0.9 * self.bases + x.mean((0, 2, 3))
            return self.norm(x)

    model = Bases()
    buffer = model.bases
    replace_statistics(model, model, BATCHES)
    assert model.bases is buffer
    assert not buffer.any()
    check_statistics(model, brute_force(model, BATCHES), ['norm'])


def test_a_model_that_cannot_be_copied_is_said(make_runner):
    class Uncopied:
        def __deepcopy__(self, memo):
            raise RuntimeError('no copy\nof it')

    runner = make_runner(True, hooks=[RADIUS, PRECISE], validate=True)
    runner.model.handle = Uncopied()
    runner.train()
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert log.count('the model cannot be copied (RuntimeError: no copy)') == 1
    assert log.count('PreciseStatsHook: 2 layers, 3 batches') == 3


def test_a_teacher_in_evaluation_mode_keeps_its_statistics():
    """SoftTeacher's predicts within the forward pass of training."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = SSN(2), SSN(2)
            self.teacher.running_mean.fill_(3)

        def forward(self, x):
            self.teacher.eval()
            self.seen = self.teacher(x)
            return self.student(x)

    model = Pair()
    set_radius(model, 1.0)
    expected = copy.deepcopy(model.teacher).eval()(BATCHES[-1])
    replaced, unused = replace_statistics(model, model, BATCHES)
    assert unused == []
    assert len(replaced) == 2
    assert torch.equal(model.seen, expected)
    assert torch.equal(model.teacher.running_mean, torch.full((2,), 3.0))
    assert not torch.equal(model.student.running_mean, torch.zeros(2))


def test_selected_norm_takes_part():
    model = nn.Sequential(SelectedNorm(2, 'LN', 'BN'), SelectedNorm(2, 'LN', 'IN'))
    assert len(replace_statistics(model, model, BATCHES)[0]) == 2
    rows = [x.double().transpose(0, 1).flatten(1) for x in BATCHES]
    var = torch.stack([r.var(1) for r in rows]).mean(0)
    torch.testing.assert_close(model[0].running_var, var.float(), rtol=1e-5, atol=1e-6)


def test_a_part_of_the_data_set(make_runner):
    loader = dict(
        dataset=dict(type='ToyImages'),
        batch_size=3,
        num_batch_per_epoch=2,
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
    )
    runner = make_runner(
        True,
        hooks=[dict(type='SSNResumeHook'), RADIUS, PRECISE],
        train_dataloader=loader,
        validate=True,
    )
    runner.train()
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert log.count('PreciseStatsHook: 2 layers, 2 batches') == 3


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class Two:
    """An optimizer for the norms, and one for the rest."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        pass

    def __call__(self, model):
        norms = [p for n, p in model.named_parameters() if 'norm' in n]
        rest = [p for n, p in model.named_parameters() if 'norm' not in n]
        wrappers = {
            name: OptimWrapper(torch.optim.SGD(parameters, lr=0.05))
            for name, parameters in (('norms', norms), ('rest', rest))
        }
        return OptimWrapperDict(**wrappers)


class StepsOfTwo(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = MODELS.build(dict(type='ToyNet'))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.net(inputs, data_samples, mode)

    def train_step(self, data, optim_wrapper):
        data = self.data_preprocessor(data, True)
        loss = self(**data, mode='loss')['loss']
        for wrapper in optim_wrapper.values():
            wrapper.zero_grad()
        loss.backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
        return dict(loss=loss.detach())


def test_several_optimizers(make_runner):
    MODELS.register_module(module=StepsOfTwo, force=True)
    runner = make_runner(
        True,
        hooks=[RADIUS, PRECISE],
        validate=True,
        model=dict(type='StepsOfTwo'),
        optim_wrapper=dict(constructor='Two'),
    )
    runner.train()
    MODELS.module_dict.pop('StepsOfTwo')
    assert runner.model.net.norm1.running_mean.abs().max() > 0
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert log.count('PreciseStatsHook: 2 layers, 3 batches') == 3


def test_other_batches_and_other_noise_every_time():
    dataset = Disturbed(DATASETS.build(dict(type='ToyImages')))
    loader = DataLoader(dataset, 3, sampler=InfiniteSampler(dataset, seed=0))

    def images(iteration):
        ours = _loader_like(loader, 0, iteration)
        return torch.cat([batch['inputs'] for batch in ours])

    first, again, other = images(4), images(4), images(8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in torch.cat((first, other)).flatten(1).tolist()}) == 24
    # In another order, too.
    samples = [torch.cat([b['data_samples'] for b in _loader_like(loader, 0, i)]) for i in (4, 8)]
    assert not torch.equal(*samples)


@pytest.mark.parametrize('ema', [None, EMA], ids=['plain', 'ema'])
def test_a_run_is_resumed_with_the_statistics_of_training(make_runner, ema):
    """mmengine writes the last checkpoint again when a validation has found a new best one."""
    hooks = [dict(type='SSNResumeHook'), RADIUS, *([] if ema is None else [ema])]
    checkpoint = dict(type='SSNCheckpointHook', interval=1, save_best='size', rule='greater')
    settings = dict(validate=True, default_hooks=dict(checkpoint=checkpoint))
    states = []
    for more in ([], [PRECISE]):
        runner = make_runner(True, hooks=[*hooks, *more], **copy.deepcopy(settings))
        runner.train()
        states.append(torch.load(f'{runner.work_dir}/epoch_1.pth', weights_only=False))
    names = ['state_dict', *([] if ema is None else ['ema_state_dict'])]
    for name in names:
        for key, value in states[0][name].items():
            assert torch.equal(value, states[1][name][key]), key


def test_generators_of_the_training_are_left_alone(make_runner):
    """Python's, numpy's and torch's, by a validation and by what follows the last iteration."""

    class Note(Hook):
        def __init__(self, priority):
            self.priority, self.before, self.after = priority, [], []

        def state(self):
            return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

        def before_val(self, runner):
            self.before.append(self.state())

        def before_val_epoch(self, runner):
            self.after.append(self.state())

    runner = make_runner(True, hooks=[RADIUS, PRECISE], validate=True)
    runner.register_hook(note := Note('LOWEST'))
    runner.train()
    assert len(note.after) == 3
    for before, after in zip(note.before, note.after, strict=True):
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])


def checkpointed(runner) -> None:
    turn_on_activation_checkpointing(runner.model, ['norm1', 'conv2', 'norm2'])


def replaced(runner) -> None:
    own = runner.model.norm1.forward
    runner.model.norm1.forward = lambda x: own(x)


@pytest.mark.parametrize('change', [checkpointed, replaced])
def test_a_forward_that_is_bound_to_the_model_is_not_that_of_the_copy(make_runner, change):
    """Of mmengine's activation_checkpointing; or of whoever wraps it, and then that is said."""
    plain = make_runner(True, hooks=[RADIUS], validate=True)
    plain.train()
    runner = make_runner(True, hooks=[RADIUS, PRECISE], validate=True)
    change(runner)
    runner.train()
    before = [f'{each.work_dir}/epoch_2.pth' for each in (plain, runner)]  # before its last work
    plain, ours = (torch.load(path, weights_only=False)['state_dict'] for path in before)
    for name, value in plain.items():
        assert torch.equal(value, ours[name]), name
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert ('the model cannot be copied' in log) == (change is replaced)


def test_a_compiled_model_is_copied(make_runner):
    runner = make_runner(True, hooks=[RADIUS, PRECISE], validate=True)
    runner.model.forward = torch.compile(runner.model.forward, backend='eager')
    runner.train()
    plain = make_runner(True, hooks=[RADIUS, PRECISE], validate=True)
    plain.train()
    for name, value in plain.model.state_dict().items():
        # compiled, it may add in another order
        torch.testing.assert_close(runner.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
