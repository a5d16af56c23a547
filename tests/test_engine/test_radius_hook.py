"""SSNRadiusHook: the schedule, exact radii in every forward pass, resumed runs and warnings."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS
from torch import nn

import ssn_plugin
from ssn_plugin import SSN, set_radius
from ssn_plugin.engine.hooks.radius_hook import SSNRadiusHook


def float32(value):
    """What the layer's buffer holds of a Python float."""
    return torch.tensor(value).item()


def linear(iterations, first=0, total=12):
    """The radii of the default schedule, from the issue's words: from 0 to 1, linear."""
    return [float32((first + i) / (total - 1)) for i in range(iterations)]


def log_of(runner):
    return next(Path(runner.work_dir).glob('*/*.log')).read_text()


def warnings_of(runner):
    return [line for line in log_of(runner).splitlines() if 'WARNING - SSNRadiusHook:' in line]


@pytest.mark.parametrize(
    ('arguments', 'iteration', 'max_iters', 'expected'),
    [
        ({}, 0, 11, 0.0),
        ({}, 5, 11, 0.5),
        ({}, 10, 11, 1.0),
        # grows from 0.1 to 0.9 between iterations 25 and 75, constant outside
        (dict(begin=0.25, end=0.75, start_radius=0.1, end_radius=0.9), 0, 101, 0.1),
        (dict(begin=0.25, end=0.75, start_radius=0.1, end_radius=0.9), 25, 101, 0.1),
        (dict(begin=0.25, end=0.75, start_radius=0.1, end_radius=0.9), 35, 101, 0.26),
        (dict(begin=0.25, end=0.75, start_radius=0.1, end_radius=0.9), 50, 101, 0.5),
        (dict(begin=0.25, end=0.75, start_radius=0.1, end_radius=0.9), 75, 101, 0.9),
        (dict(begin=0.25, end=0.75, start_radius=0.1, end_radius=0.9), 100, 101, 0.9),
        # a run of one iteration has no progress to divide by
        (dict(start_radius=0.3), 0, 1, 1.0),
    ],
)
def test_radius_at(arguments, iteration, max_iters, expected):
    assert SSNRadiusHook(**arguments).radius_at(iteration, max_iters) == pytest.approx(expected)


@pytest.mark.parametrize('end_radius', [1.0, math.sqrt(2 / 3), 0.9])
def test_last_iteration_has_end_radius_exactly(end_radius):
    for max_iters in (2, 7, 90_000):
        hook = SSNRadiusHook(end_radius=end_radius)
        assert hook.radius_at(max_iters - 1, max_iters) == end_radius


@pytest.mark.parametrize(
    ('arguments', 'names'),
    [
        (dict(begin=-0.1), ['begin', '-0.1']),
        (dict(end=1.1), ['end', '1.1']),
        (dict(begin=0.5, end=0.5), ['begin', 'end', '0.5']),
        (dict(begin=0.8, end=0.2), ['begin', 'end', '0.8', '0.2']),
        (dict(begin=math.nan), ['begin', 'nan']),
        (dict(end=math.nan), ['end', 'nan']),
        (dict(begin='0.1'), ['begin', '0.1']),
        (dict(end=None), ['end', 'None']),
        (dict(start_radius=-0.5), ['start_radius', '-0.5']),
        (dict(end_radius=-1), ['end_radius', '-1']),
        (dict(end_radius=math.nan), ['end_radius', 'nan']),
        # 0 * inf: the schedule would be NaN in the first iteration
        (dict(end_radius=math.inf), ['end_radius', 'inf']),
        (dict(start_radius='0'), ['start_radius', "'0'"]),
        (dict(min_values=-1), ['min_values', '-1']),
        (dict(min_values=1.5), ['min_values', '1.5']),
        (dict(min_values=True), ['min_values', 'True']),
    ],
)
def test_bad_argument_is_named(arguments, names):
    with pytest.raises(ValueError, match='expected') as raised:
        SSNRadiusHook(**arguments)
    for name in names:
        assert name in str(raised.value)


def test_sets_every_layer_by_runner_iter_and_not_by_batch_idx():
    model = nn.Sequential(
        SSN(2), nn.Sequential(nn.Conv2d(2, 2, 1), SSN(2, normalizers=('IN', 'BN')))
    )
    runner = Mock(model=model, iter=3, max_iters=13, hooks=[])
    SSNRadiusHook().before_train_iter(runner, batch_idx=9)
    assert [m.radius.item() for m in (model[0], model[1][1])] == [0.25, 0.25]


def test_mock_warnings_name_undecided_and_frozen_layers_separately():
    model = nn.ModuleDict(
        dict(undecided=SSN(2), decided=SSN(2), partly=SSN(2), stuck=SSN(2), stuck_decided=SSN(2))
    )
    set_radius(model['decided'], 1.0)
    set_radius(model['stuck_decided'], 1.0)
    with torch.no_grad():
        model['partly'].mean_weight.copy_(torch.tensor([3.0, 0.0, 0.0]))  # one-hot at radius 0
    set_radius(model['partly'], 0.0)
    assert model['partly'].selected == ('IN', None)
    for name in ('stuck', 'stuck_decided'):
        model[name].requires_grad_(False)
    runner = Mock(model=nn.Sequential(model))
    SSNRadiusHook(end_radius=0.5).after_train(runner)
    (growing,), (frozen,) = (call.args for call in runner.logger.warning.call_args_list)
    assert '2 SSN layers are not one-hot' in growing
    assert 'end_radius=0.5' in growing
    assert growing.endswith(': 0.undecided, 0.partly')
    assert '1 SSN layers with frozen parameters' in frozen
    assert frozen.endswith(': 0.stuck')


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_radius_of_every_forward(make_runner, by_epoch):
    runner = make_runner(by_epoch, validate=True)
    runner.train()
    assert runner.model.radii == [(r, r) for r in linear(12)]
    assert None not in runner.model.norm1.selected + runner.model.norm2.selected
    assert warnings_of(runner) == []


def test_radius_follows_begin_end_start_and_end_radius(make_runner):
    hook = dict(type='SSNRadiusHook', begin=0.25, end=0.75, start_radius=0.1, end_radius=0.6)
    runner = make_runner(hooks=[hook], train_cfg=dict(by_epoch=False, max_iters=9))
    runner.train()
    expected = [0.1, 0.1, 0.1, 0.225, 0.35, 0.475, 0.6, 0.6, 0.6]
    assert [radius for radius, _ in runner.model.radii] == pytest.approx(expected)


def test_gradient_accumulation_does_not_slow_the_schedule(make_runner):
    optim_wrapper = dict(
        optimizer=dict(type='SGD', lr=0.05),
        accumulative_counts=3,
        constructor='SSNOptimWrapperConstructor',
    )
    runner = make_runner(optim_wrapper=optim_wrapper)
    runner.train()
    assert runner.model.radii == [(r, r) for r in linear(12)]
    assert None not in runner.model.norm1.selected + runner.model.norm2.selected


def test_circumradius_at_the_last_iteration_decides(make_runner):
    hook = dict(type='SSNRadiusHook', end_radius=math.sqrt(2 / 3))
    runner = make_runner(hooks=[hook])
    runner.train()
    assert runner.model.radii[-1] == (float32(math.sqrt(2 / 3)),) * 2
    for norm in (runner.model.norm1, runner.model.norm2):
        assert None not in norm.selected
        assert (norm.mean_fixed.item(), norm.var_fixed.item()) == (1, 1)
    assert warnings_of(runner) == []


def test_hooks_of_normal_priority_see_the_radius_of_their_iteration(make_runner):
    seen = []

    class Spy(Hook):
        priority = 'NORMAL'

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seen.append(runner.model.norm1.radius.item())

    # registered first: among equals the order of registration would decide
    runner = make_runner(hooks=[])
    runner.register_hook(Spy())
    runner.register_hook(dict(type='SSNRadiusHook'))
    runner.train()
    assert seen == linear(12)


@pytest.mark.parametrize(
    ('by_epoch', 'checkpoint', 'done'),
    [(False, 'iter_5.pth', 5), (False, 'iter_8.pth', 8), (True, 'epoch_1.pth', 4)],
)
def test_resumed_run_is_bit_identical(make_runner, by_epoch, checkpoint, done):
    overrides = dict(
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-3),
            constructor='SSNOptimWrapperConstructor',
            # some ratios are decided before the checkpoint is written, others after
            paramwise_cfg=dict(ssn_lr_mult=30.0),
        ),
        param_scheduler=dict(type='MultiStepLR', milestones=[3, 7], by_epoch=False),
    )
    straight = make_runner(by_epoch, **overrides)
    straight.train()
    file = Path(straight.work_dir) / checkpoint
    saved = torch.load(file, weights_only=False)['state_dict']
    flags = [saved[f'norm{i}.{s}_fixed'].item() for i in (1, 2) for s in ('mean', 'var')]
    assert {0, 1} == set(flags)

    resumed = make_runner(by_epoch, load_from=str(file), resume=True, **overrides)
    resumed.train()
    assert resumed.model.radii == straight.model.radii[done:]
    assert resumed.model.radii[0][0] == linear(1, done)[0]
    for norm in ('norm1', 'norm2'):
        ours, theirs = getattr(resumed.model, norm), getattr(straight.model, norm)
        assert ours.selected == theirs.selected
        assert None not in ours.selected
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_end_of_training_warnings_in_the_log(make_runner):
    runner = make_runner(
        hooks=[dict(type='SSNRadiusHook', end_radius=0.5)],
        model=dict(
            type='ToyNet',
            norm_cfg=dict(type='SSN', requires_grad=False),
            second_norm_cfg=dict(type='SSN'),
        ),
    )
    runner.train()
    growing, frozen = warnings_of(runner)
    assert 'WARNING' in growing
    assert growing.endswith(
        '1 SSN layers are not one-hot at the end of training (end_radius=0.5): norm2'
    )
    assert frozen.endswith(
        '1 SSN layers with frozen parameters keep ratios that are not one-hot: norm1'
    )
    assert {radius for radius, _ in runner.model.radii} == {0.0}  # the frozen layer's


@pytest.mark.parametrize('norm', ['BN', 'SN'])
def test_model_without_ssn_warns_once_and_trains(make_runner, norm):
    runner = make_runner(model=dict(type='ToyNet', norm_cfg=dict(type=norm)))
    runner.train()
    (line,) = warnings_of(runner)
    assert 'WARNING' in line
    assert 'the model has no SSN layer' in line


@pytest.mark.parametrize(('begin', 'count'), [(0.0, 1), (0.3, 0)])
def test_two_candidates_that_would_decide_at_once_warn(make_runner, begin, count):
    norm = dict(type='SSN', normalizers=('IN', 'LN'))
    hooks = [dict(type='SSNRadiusHook', begin=begin)]
    runner = make_runner(model=dict(type='ToyNet', norm_cfg=norm), custom_hooks=hooks)
    runner.train()
    lines = warnings_of(runner)
    assert len(lines) == count
    assert all('two candidates' in line and 'begin=0.3' in line for line in lines)


@pytest.mark.parametrize('min_values', [0, 60])
def test_candidates_with_few_values_are_left_out(make_runner, min_values):
    norm = dict(type='SSN', normalizers=('LN', 'GN', 'BN'), num_groups=2)
    hooks = [dict(type='SSNRadiusHook', min_values=min_values)]
    runner = make_runner(model=dict(type='ToyNet', norm_cfg=norm), custom_hooks=hooks)
    norms = runner.model.norm1, runner.model.norm2
    shares = []

    class Shares(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            shares.append([float(layer.mean_ratios[2]) for layer in norms])

    runner.register_hook(Shares(), 'LOW')
    runner.train()
    # BN has 3 x 6 x 6 values in the first layer and 3 x 4 x 4 in the second.
    said = [line for line in log_of(runner).splitlines() if 'left out' in line]
    assert len(said) == bool(min_values)
    assert all('norm2: BN' in line and 'min_values=60' in line for line in said)
    first, second = zip(*shares, strict=True)
    assert first[0] > 0
    assert (max(second) == 0) == bool(min_values)
    assert all(layer.values_seen is None for layer in norms)


FEW = dict(
    model=dict(
        type='ToyNet', norm_cfg=dict(type='SSN', normalizers=('LN', 'GN', 'BN'), num_groups=2)
    ),
    custom_hooks=[dict(type='SSNRadiusHook', min_values=60)],
)


class Unfreezing(Hook):
    """Trains a part from the second iteration on."""

    def before_train(self, runner):
        runner.model.norm2.requires_grad_(False)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.model.norm2.requires_grad_(True)


class FailingOnce(Hook):
    """Ends the training once, between the first step and what other hooks do after it."""

    failed = False

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.failed:
            self.failed = True
            raise KeyboardInterrupt


@pytest.mark.parametrize('late', [False, True])
def test_candidates_are_left_out_of_layers_that_train_later(make_runner, late):
    runner = make_runner(**FEW)
    if late:
        runner.register_hook(Unfreezing())
    else:
        runner.register_hook(FailingOnce(), 'HIGHEST')
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    runner.train()
    (said,) = (line for line in log_of(runner).splitlines() if 'left out' in line)
    assert 'norm2: BN' in said
    assert 'BN' not in runner.model.norm2.selected
    assert runner.model.norm2.values_seen is None


def test_a_run_that_decides_at_once_leaves_nothing_out(make_runner):
    runner = make_runner(**FEW, train_cfg=dict(by_epoch=False, max_iters=1))
    runner.train()
    assert 'left out' not in log_of(runner)


def test_layers_that_are_not_reached_are_told_once(make_runner):
    runner = make_runner(**FEW)
    runner.model.never_called = SSN(4)
    runner.train()
    (said,) = (line for line in log_of(runner).splitlines() if 'waits for' in line)
    assert '1 SSN layers' in said
    assert said.endswith(': never_called')


def test_averages_leave_out_the_same(make_runner):
    """Also one that was a copy before the candidate was left out."""
    runner = make_runner(**FEW)
    runner.register_hook(average := EMAHook(momentum=0.02), 'HIGHEST')
    shares = []

    class Shares(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            ratios = average.ema_model.module.norm2.mean_ratios
            shares.append(float(ratios[2]))

    runner.register_hook(Shares(), 'LOWEST')
    runner.train()
    assert shares[0] > 0
    assert max(shares[2:]) == 0
    assert average.ema_model.module.norm2.selected == runner.model.norm2.selected


def test_a_resumed_run_leaves_nothing_out_again(make_runner):
    """Its layers have begun to choose; what was left out is so in the checkpoint."""
    stopped = make_runner(**FEW)
    stopped.train()
    checkpoint = str(Path(stopped.work_dir) / 'iter_1.pth')
    resumed = make_runner(**FEW, load_from=checkpoint, resume=True)
    resumed.train()
    assert 'left out' not in log_of(resumed)
    for name, value in stopped.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_distributed_wrapper(make_runner):
    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        wrapped = MMDistributedDataParallel(MODELS.build(dict(type='ToyNet')), device_ids=None)
        runner = make_runner(model=wrapped, hooks=[dict(type='SSNRadiusHook', end_radius=0.7)])
        runner.train()
        expected = [float32(0.7 * i / 11) for i in range(12)]
        assert [radius for radius, _ in wrapped.module.radii] == expected
        (line,) = warnings_of(runner)
        # names as in the model, not those of the wrapper
        assert line.endswith(': norm1, norm2')
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_training_goes_on_after_freezing(make_runner):
    """A parameter without gradient would stop DistributedDataParallel in the next iteration."""
    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        wrapped = MMDistributedDataParallel(
            MODELS.build(dict(type='ToyNet')), device_ids=None, find_unused_parameters=False
        )
        gradients = []

        wrapped.module.norm1.mean_weight.register_post_accumulate_grad_hook(
            lambda parameter: gradients.append(parameter.grad.abs().max().item())
        )
        runner = make_runner(model=wrapped, hooks=[dict(type='SSNRadiusHook', end=0.5)])
        runner.train()
        # one gradient per iteration; iteration 5 is the first with a radius beyond 0.8165
        assert len(gradients) == 12
        assert gradients[0] > 0
        assert gradients[5:] == [0.0] * 7
        assert warnings_of(runner) == []
    finally:
        torch.distributed.destroy_process_group()


TWO_RANKS = """
import json, sys
from types import SimpleNamespace
import torch
from torch import nn
from mmengine.hooks import SyncBuffersHook
from mmengine.model import MMDistributedDataParallel
from ssn_plugin import SSN
from ssn_plugin.engine.hooks.radius_hook import SSNRadiusHook

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(2, 4, 3), SSN(4), nn.ReLU(), nn.Conv2d(4, 4, 3), SSN(4))
target = torch.randn(4)
model = MMDistributedDataParallel(net, device_ids=None, broadcast_buffers=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
runner = SimpleNamespace(model=model, max_iters=12, hooks=[])
hook, sync = SSNRadiusHook(), SyncBuffersHook()
torch.manual_seed(rank)  # every rank its own images
report, before = [], None
for runner.iter in range(12):
    hook.before_train_iter(runner, runner.iter)
    x = torch.randn(2, 2, 8, 8) * (1 + rank) + rank
    loss = (model(x).relu().mean((2, 3)) - target).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    # at first: layers that decide against BN leave their running statistics alone from then on
    before = before or [net[i].running_mean.tolist() for i in (1, 4)]
    sync.after_train_epoch(runner)
    report.append([
        [net[i].radius.item(), net[i].mean_fixed.item(), net[i].var_fixed.item(),
         net[i].mean_ratios.tolist(), net[i].var_ratios.tolist(), net[i].running_mean.tolist()]
        for i in (1, 4)
    ])
torch.distributed.destroy_process_group()
print(json.dumps([before, report]))
"""


def test_sync_buffers_hook_keeps_radius_and_flags(tmp_path):
    """It averages every buffer over the ranks; ours are equal there, so they stay what they are."""
    root = Path(ssn_plugin.__file__).parents[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, '-c', TWO_RANKS, str(rank), str(tmp_path / 'store')],
            stdout=subprocess.PIPE,
            env={**os.environ, 'PYTHONPATH': str(root)},
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    (before0, report0), (before1, report1) = (json.loads(o.splitlines()[-1]) for o in outputs)
    assert before0 != before1  # the ranks saw different images, so there was something to average
    assert report0 == report1
    flags = set()
    for layers, radius in zip(report0, linear(12), strict=True):
        for layer in layers:
            assert layer[0] == radius
            flags.add((layer[1], layer[2]))
    assert flags <= {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(layer[1:3] == [1, 1] for layer in report0[-1])
