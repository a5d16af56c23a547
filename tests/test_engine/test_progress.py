"""Runs resumed with other batches, and runs that only validate or test."""

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from ssn_plugin import SSN
from ssn_plugin.engine.hooks.precise_stats_hook import _loader_like

RADIUS = dict(type='SSNRadiusHook')
OURS = [
    dict(type='SSNStartHook'),
    dict(type='SSNResumeHook'),
    RADIUS,
    dict(type='SSNRatioHook', interval=1, report=False),
    dict(type='PreciseStatsHook', num_batches=2),
]


def loader(batch_size: int, by_epoch=True, **changes) -> dict:
    sampler = dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True)
    return dict(
        dataset=dict(type='ToyImages'),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=dict(type='default_collate'),
        **changes,
    )


def log_of(runner) -> str:
    return next(Path(runner.work_dir).glob('*/*.log')).read_text()


def lines_of(runner) -> list[dict]:
    texts = Path(runner.work_dir, 'ratios.jsonl').read_text().splitlines()
    return [line for line in map(json.loads, texts) if 'iter' in line]


class Batches(Hook):
    """Counts what PreciseStatsHook passes through the model before the last checkpoint."""

    priority = 'LOWEST'

    def __init__(self):
        self.statistics = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.statistics.append(runner.model.norm1.running_mean.clone())


# At 4 epochs of 12 images: batches of 3 are 4 iterations an epoch, of 6 are 2, of 2 are 6. The
# number of iterations that the checkpoint knows does not end any of the other runs.
@pytest.mark.parametrize(('size', 'per_epoch'), [(6, 2), (2, 6), (12, 1), (5, 3)])
@pytest.mark.parametrize('epoch', [1, 2])
def test_the_radius_follows_the_epochs(make_runner, epoch, size, per_epoch):
    settings = dict(train_cfg=dict(by_epoch=True, max_epochs=4))
    before = make_runner(True, hooks=OURS, **settings)
    before.train()
    resumed = make_runner(
        True,
        hooks=OURS,
        train_dataloader=loader(size),
        load_from=f'{before.work_dir}/epoch_{epoch}.pth',
        resume=True,
        **settings,
    )
    resumed.train()
    total = 4 * per_epoch
    expected = [torch.tensor(i / (total - 1)).item() for i in range(epoch * per_epoch, total)]
    assert [radius for radius, _ in resumed.model.radii[: len(expected)]] == expected
    assert None not in resumed.model.norm1.selected + resumed.model.norm2.selected
    log = log_of(resumed)
    assert log.count(f'resumed after {epoch} epochs and {4 * epoch} iterations') == 1
    assert f'are {epoch * per_epoch} iterations now' in log
    # What is done at the end was done once: two batches, then the record of the last iteration.
    assert log.count('PreciseStatsHook: ') == 1
    assert 'not one-hot' not in log
    lines = lines_of(resumed)
    assert [line['iter'] for line in lines] == list(
        range(4 * epoch + 1, 4 * epoch + 1 + total - epoch * per_epoch)
    )
    first = json.loads(Path(resumed.work_dir, 'ratios.jsonl').read_text().splitlines()[0])
    assert first['about']['max_iters'] == lines[-1]['iter']
    assert lines[-1]['radius'] == 1


def test_the_last_record_comes_where_the_interval_has_none(make_runner):
    hooks = [RADIUS, dict(type='SSNRatioHook', interval=100, report=False)]
    before = make_runner(True, hooks=hooks)
    before.train()
    assert [line['iter'] for line in lines_of(before)] == [12]
    resumed = make_runner(
        True,
        hooks=hooks,
        train_dataloader=loader(6),
        load_from=f'{before.work_dir}/epoch_1.pth',
        resume=True,
    )
    resumed.train()
    assert [line['iter'] for line in lines_of(resumed)] == [8]


def test_the_same_batches_are_no_change(make_runner):
    before = make_runner(True)
    before.train()
    file = f'{before.work_dir}/epoch_1.pth'
    resumed = make_runner(True, load_from=file, resume=True)
    resumed.train()
    assert resumed.model.radii == before.model.radii[4:]
    assert 'resumed after' not in log_of(resumed)


def test_a_checkpoint_from_within_an_epoch(make_runner):
    """mmengine begins that epoch again, and so does the radius."""
    settings = dict(
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False))
    )
    before = make_runner(True, **settings)
    before.train()
    resumed = make_runner(True, load_from=f'{before.work_dir}/iter_6.pth', resume=True, **settings)
    resumed.train()
    assert [radius for radius, _ in resumed.model.radii] == [
        torch.tensor(i / 11).item() for i in range(4, 12)
    ]
    assert 'or a checkpoint from within an epoch' in log_of(resumed)
    assert None not in resumed.model.norm1.selected


def test_an_iteration_loop_goes_by_iterations(make_runner):
    before = make_runner(hooks=OURS)
    before.train()
    resumed = make_runner(
        hooks=OURS,
        train_dataloader=loader(6, by_epoch=False),
        load_from=f'{before.work_dir}/iter_5.pth',
        resume=True,
    )
    resumed.train()
    assert resumed.model.radii[:7] == before.model.radii[5:12]
    assert 'resumed after' not in log_of(resumed)


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
@pytest.mark.parametrize('size', [3, 6])
def test_an_averaged_model_is_resumed_with_other_batches(make_runner, by_epoch, size):
    hooks = [*OURS, dict(type='EMAHook', momentum=0.05, update_buffers=True)]
    before = make_runner(by_epoch, hooks=hooks)
    before.train()
    name = 'epoch_1.pth' if by_epoch else 'iter_4.pth'
    resumed = make_runner(
        by_epoch,
        hooks=hooks,
        train_dataloader=loader(size, by_epoch),
        load_from=f'{before.work_dir}/{name}',
        resume=True,
    )
    resumed.train()
    (averaged,) = (hook.ema_model.module for hook in resumed.hooks if hasattr(hook, 'ema_model'))
    for layer in ('norm1', 'norm2'):
        ours, theirs = getattr(averaged, layer), getattr(resumed.model, layer)
        assert ours.selected == theirs.selected
        assert None not in ours.selected
        assert ours.radius.item() == theirs.radius.item() == 1


def test_a_schedule_of_one_iteration(make_runner):
    runner = make_runner(
        True, train_dataloader=loader(12), train_cfg=dict(by_epoch=True, max_epochs=1), hooks=OURS
    )
    runner.train()
    assert runner.model.radii[0] == (1.0, 1.0)


@pytest.mark.parametrize('drop_last', [False, True])
def test_the_last_batch_is_dropped_or_not(make_runner, drop_last):
    batches = loader(5, drop_last=drop_last)
    runner = make_runner(True, train_dataloader=batches, hooks=OURS)
    runner.train()
    total = 3 * (2 if drop_last else 3)
    expected = [torch.tensor(i / (total - 1)).item() for i in range(total)]
    assert [radius for radius, _ in runner.model.radii[:total]] == expected
    assert lines_of(runner)[-1]['iter'] == total


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
@pytest.mark.parametrize('count', [1, 3])
def test_steps_over_several_batches(make_runner, by_epoch, count):
    runner = make_runner(
        by_epoch,
        hooks=OURS,
        validate=True,
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.05),
            accumulative_counts=count,
            constructor='SSNOptimWrapperConstructor',
        ),
    )
    runner.train()
    radii = [radius for radius, _ in runner.model.radii]
    assert {torch.tensor(i / 11).item() for i in range(12)} <= set(radii)
    assert None not in runner.model.norm1.selected


# ---------------------------------------------------------------- validation and test alone


@pytest.mark.parametrize('job', ['val', 'test'])
@pytest.mark.parametrize('ema', [False, True])
@pytest.mark.parametrize('save_best', [None, 'size'])
def test_every_hook_in_a_runner_that_does_not_train(make_runner, job, ema, save_best):
    rule = dict(save_best=save_best, rule='greater') if save_best else {}
    hooks = [*OURS, *([dict(type='EMAHook')] if ema else [])]
    validation = loader(3) | dict(sampler=dict(type='DefaultSampler', shuffle=False))
    parts = {
        f'{job}_dataloader': validation,
        f'{job}_cfg': dict(),
        f'{job}_evaluator': dict(type='ToyMetric'),
    }
    runner = make_runner(
        True,
        hooks=hooks,
        default_hooks=dict(checkpoint=dict(type='SSNCheckpointHook', **rule)),
        **(dict.fromkeys(['train_dataloader', 'train_cfg', 'optim_wrapper']) | parts),
    )
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    metrics = getattr(runner, job)()
    assert metrics == dict(size=12)
    for name, value in runner.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not list(Path(runner.work_dir).glob('*.pth'))
    assert not Path(runner.work_dir, 'ratios.jsonl').exists()


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_validation_before_and_after_training(make_runner, by_epoch):
    runner = make_runner(
        by_epoch,
        hooks=OURS,
        validate=True,
        default_hooks=dict(checkpoint=dict(type='SSNCheckpointHook', by_epoch=by_epoch)),
    )
    assert runner.val() == dict(size=12)
    runner.train()
    state = {name: value.clone() for name, value in runner.model.state_dict().items()}
    assert runner.val() == dict(size=12)
    for name, value in runner.model.state_dict().items():
        assert torch.equal(value, state[name]), name


# ---------------------------------------------------------------- a loss that is lost


@DATASETS.register_module(force=True)
class SpoiltImages(Dataset):
    """The toy images, the seventh of them NaN."""

    def __init__(self):
        self.images = DATASETS.build(dict(type='ToyImages'))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = self.images[index]
        return dict(item, inputs=item['inputs'] * math.nan) if index == 6 else item


def spoilt() -> dict:
    sampler = dict(type='DefaultSampler', shuffle=False)
    return loader(3) | dict(dataset=dict(type='SpoiltImages'), sampler=sampler)


def test_control_parameters_survive_a_lost_loss(make_runner):
    runner = make_runner(True, hooks=OURS[2:4], train_dataloader=spoilt())
    runner.train()
    for norm in (runner.model.norm1, runner.model.norm2):
        assert norm.mean_weight.isfinite().all()
        assert norm.var_weight.isfinite().all()
        assert None not in norm.selected
    log = log_of(runner)
    assert log.count('SSNOptimWrapperConstructor: the gradient of') == 1
    assert 'the gradient of norm1.mean_weight is NaN or infinite in iteration 3' in log
    assert 'of 4 of 4 control parameters' in log
    assert 'one-hot at the end' not in log


def test_a_lost_loss_under_another_constructor_is_told_from_the_schedule(make_runner):
    optimizer = dict(optimizer=dict(type='SGD', lr=0.05))
    runner = make_runner(True, hooks=OURS[2:4], train_dataloader=spoilt(), optim_wrapper=optimizer)
    runner.train()
    log = log_of(runner)
    assert log.count('the importance ratios of norm1 and 1 more layers are NaN after iteration 3')
    assert log.count('SSNRatioHook: the importance ratios') == 1
    assert '2 SSN layers have control parameters that are NaN or infinite' in log
    assert 'end_radius' not in log
    for text in Path(runner.work_dir, 'ratios.jsonl').read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)
    assert lines_of(runner)[-1]['mean'] == [[None] * 3] * 2


def test_a_report_of_a_lost_loss(make_runner):
    optimizer = dict(optimizer=dict(type='SGD', lr=0.05))
    hooks = [RADIUS, dict(type='SSNRatioHook', interval=1)]
    runner = make_runner(True, hooks=hooks, train_dataloader=spoilt(), optim_wrapper=optimizer)
    runner.train()
    assert 'SSNRatioHook: no report' not in log_of(runner)
    assert Path(runner.work_dir, 'report.html').is_file()
    assert isinstance(runner.model.norm1, SSN)


# ---------------------------------------------------------------- ended early


class Stop(Hook):
    """Ends the training after an iteration, as a user's hook may."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.train_loop.stop_training = runner.iter + 1 >= self.iteration


@pytest.mark.parametrize('ema', [(), (dict(type='EMAHook', momentum=0.05),)])
@pytest.mark.parametrize('by_epoch', [False, True])
def test_a_run_that_is_ended_early_has_its_end(make_runner, by_epoch, ema):
    """The last record, and the last checkpoint with the averages of the last weights."""
    early = dict(type='EarlyStoppingHook', monitor='size', rule='greater', patience=1)
    checkpoint = dict(type='SSNCheckpointHook', interval=2, by_epoch=by_epoch)
    hooks = [*OURS[:3], *ema, dict(type='SSNRatioHook', interval=5, report=False), OURS[4], early]
    settings = dict(validate=True, default_hooks=dict(checkpoint=checkpoint))
    if by_epoch:
        settings['train_cfg'] = dict(by_epoch=True, max_epochs=9)
    else:
        settings['train_cfg'] = dict(by_epoch=False, max_iters=20, val_interval=3)
    runner = make_runner(by_epoch, hooks=hooks, **settings)
    runner.train()
    done = runner.iter
    assert done < runner.max_iters
    assert lines_of(runner)[-1]['iter'] == done
    path = Path(runner.work_dir, f'epoch_{runner.epoch}.pth' if by_epoch else f'iter_{done}.pth')
    assert Path(runner.work_dir, 'last_checkpoint').read_text() == str(path)
    saved = torch.load(path, weights_only=False)
    assert (saved['meta']['epoch'], saved['meta']['iter']) == (runner.epoch, done)
    model = runner.model
    kept = saved['ema_state_dict'] if ema else saved['state_dict']
    for name, value in model.state_dict().items():
        assert torch.equal(kept[f'module.{name}' if ema else name], value), name
    seen = []
    handle = model.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in islice(_loader_like(runner.train_dataloader, runner.seed, done), 2):
        model(**batch, mode='loss')
    handle.remove()
    expected = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(model.norm1.running_mean, expected, rtol=1e-4, atol=1e-5)


def test_a_run_that_ends_by_itself_is_ended_once(make_runner):
    """With the last iteration a hook asks for what comes anyway."""
    hooks = [RADIUS, dict(type='SSNRatioHook', interval=5, report=False), OURS[4]]
    checkpoint = dict(type='SSNCheckpointHook', interval=20, by_epoch=False)
    runner = make_runner(hooks=hooks, default_hooks=dict(checkpoint=checkpoint))
    runner.register_hook(Stop(12))
    runner.train()
    assert [line['iter'] for line in lines_of(runner)] == [5, 10, 12]
    assert log_of(runner).count('PreciseStatsHook: 2 layers') == 1
    assert sorted(path.name for path in Path(runner.work_dir).glob('*.pth')) == ['iter_12.pth']
