"""mmengine's EMAHook: averaged models keep the frozen ratios, in memory, in files and on resume.

It averages parameters and copies buffers, so that a fixed flag may stand beside control parameters
that are averages of the one-hot vector and of what was before.
"""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from torch import nn

from ssn_plugin import SSN, set_radius

ONE_HOT = {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}
# decided after half of the run, in iteration 5
RADIUS = dict(type='SSNRadiusHook', end=0.5)


def ema_of(runner):
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
    return hook.ema_model.module


def check_files_are_one_hot(state_dict, prefix=''):
    """Every fixed flag stands beside a one-hot vector."""
    for layer in ('norm1', 'norm2'):
        for statistic in ('mean', 'var'):
            assert state_dict[f'{prefix}{layer}.{statistic}_fixed'].item() == 1
            control = state_dict[f'{prefix}{layer}.{statistic}_weight']
            assert tuple(control.tolist()) in ONE_HOT, (layer, statistic, control)


def load(runner, name):
    return torch.load(Path(runner.work_dir) / name, weights_only=False)


class Averages(Hook):
    """Notes the averaged control parameters of the first layer before they are first saved."""

    priority = 'LOW'  # after EMAHook, before CheckpointHook

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == 7:
            self.control = ema_of(runner).norm1.mean_weight.tolist()


@pytest.mark.parametrize(
    'ema',
    [
        dict(type='EMAHook', momentum=0.05),
        dict(type='EMAHook', ema_type='StochasticWeightAverage'),
        dict(type='EMAHook', momentum=0.05, begin_iter=3),
        # enabled only after the layers were decided
        dict(type='EMAHook', momentum=0.05, begin_iter=8),
        # as in mmdet's configs of RTMDet and YOLOX: buffers are averaged too
        dict(type='EMAHook', momentum=0.05, update_buffers=True),
    ],
    ids=['exponential', 'stochastic', 'late', 'after_freezing', 'update_buffers'],
)
def test_frozen_ratios_in_the_averaged_model_and_its_files(make_runner, ema):
    checkpoint = dict(type='CheckpointHook', interval=7, by_epoch=False)
    runner = make_runner(
        hooks=[RADIUS, ema], validate=True, default_hooks=dict(checkpoint=checkpoint)
    )
    runner.register_hook(averages := Averages())
    runner.train()
    for layer in ('norm1', 'norm2'):
        averaged, source = getattr(ema_of(runner), layer), getattr(runner.model, layer)
        assert averaged.selected == source.selected
        assert None not in source.selected
        assert tuple(averaged.mean_ratios.tolist()) in ONE_HOT
        assert tuple(averaged.var_ratios.tolist()) in ONE_HOT
    if 'begin_iter' not in ema and not ema.get('update_buffers'):
        # the averages themselves have not arrived, so it is the plugin that keeps the ratios; with
        # update_buffers the hook copies the selection, and the averages are written back too
        assert tuple(averages.control) not in ONE_HOT
    # iter_7 lies between the freezing and the late start of the averaging
    for name in ('iter_7.pth', 'iter_12.pth'):
        checkpoint = load(runner, name)
        check_files_are_one_hot(checkpoint['state_dict'])  # the averaged model, for deployment
        check_files_are_one_hot(checkpoint['ema_state_dict'], 'module.')  # the trained one
        for layer in ('norm1', 'norm2'):
            for key in ('mean_weight', 'var_weight'):
                ours = checkpoint['state_dict'][f'{layer}.{key}']
                assert torch.equal(ours, checkpoint['ema_state_dict'][f'module.{layer}.{key}'])


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_validation_sees_the_selected_normalizers_and_training_goes_on(make_runner, by_epoch):
    """For validation EMAHook swaps the parameters of both models, the averages into the trained."""
    seen = []

    class Spy(Hook):
        priority = 'LOWEST'  # after the swap

        def before_val_epoch(self, runner):
            seen.append((runner.model.norm1.selected, ema_of(runner).norm1.selected))

    overrides = (
        {} if by_epoch else dict(train_cfg=dict(by_epoch=False, max_iters=12, val_interval=4))
    )
    runner = make_runner(
        by_epoch, hooks=[RADIUS, dict(type='EMAHook', momentum=0.05)], validate=True, **overrides
    )
    runner.register_hook(Spy())
    runner.train()
    final = runner.model.norm1.selected
    assert None not in final
    # after 4 iterations nothing is decided, after 8 and 12 everything
    assert [None in selected for selected, _ in seen] == [True, False, False]
    assert seen[1:] == [(final, final)] * 2
    for layer in (runner.model.norm1, runner.model.norm2):
        assert tuple(layer.mean_ratios.tolist()) in ONE_HOT
        assert tuple(layer.var_ratios.tolist()) in ONE_HOT
    check_files_are_one_hot(runner.model.state_dict())


@pytest.mark.parametrize(
    ('by_epoch', 'name'),
    [(False, 'iter_3.pth'), (False, 'iter_9.pth'), (True, 'epoch_1.pth'), (True, 'epoch_2.pth')],
)
def test_resume_before_and_after_the_freezing(make_runner, by_epoch, name):
    hooks = [RADIUS, dict(type='EMAHook', momentum=0.05)]
    straight = make_runner(by_epoch, hooks=hooks)
    straight.train()
    file = str(Path(straight.work_dir) / name)
    resumed = make_runner(by_epoch, hooks=hooks, load_from=file, resume=True)
    resumed.train()
    last = 'epoch_3.pth' if by_epoch else 'iter_12.pth'
    check_files_are_one_hot(load(resumed, last)['state_dict'])
    check_files_are_one_hot(load(resumed, last)['ema_state_dict'], 'module.')
    for ours, theirs in (
        (resumed.model, straight.model),
        (ema_of(resumed), ema_of(straight)),
    ):
        for layer in ('norm1', 'norm2'):
            assert getattr(ours, layer).selected == getattr(theirs, layer).selected
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key


def test_averaged_checkpoint_is_the_averaged_model(make_runner):
    """What the file holds computes what the model in memory computes."""
    runner = make_runner(hooks=[RADIUS, dict(type='EMAHook', momentum=0.05)])
    runner.train()
    fresh = make_runner(hooks=[]).model
    fresh.load_state_dict(load(runner, 'iter_12.pth')['state_dict'])
    x = torch.randn(3, 2, 8, 8)
    for model in (fresh, ema_of(runner)):
        model.eval()
    assert torch.equal(fresh(x), ema_of(runner)(x))
    assert not torch.equal(fresh(x), runner.model.eval()(x))


def test_hand_made_average():
    """Flags copied, parameters averaged: the ratios come from the flag's choice."""
    source, averaged = nn.Sequential(SSN(2)), nn.Sequential(SSN(2))
    with torch.no_grad():
        source[0].mean_weight.copy_(torch.tensor([0.0, 0.9, 0.0]))
    set_radius(source, 1.0)
    with torch.no_grad():
        for ours, theirs in zip(averaged.buffers(), source.buffers(), strict=True):
            ours.copy_(theirs)
        averaged[0].mean_weight.copy_(torch.tensor([0.5, 0.3, 0.2]))
    assert averaged[0].selected == ('LN', 'BN')
    assert averaged.state_dict()['0.mean_weight'].tolist() == [0.0, 1.0, 0.0]
