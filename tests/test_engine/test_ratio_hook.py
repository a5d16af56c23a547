"""SSNRatioHook: what reaches log, message hub, TensorBoard, history and report, and when."""

import errno
import io
import logging
import os
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.visualization import LocalVisBackend
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from ssn_plugin import SN, SSN, set_radius
from ssn_plugin.analysis.history import read_history
from ssn_plugin.analysis.layer_ratios import layer_ratios
from ssn_plugin.engine.hooks.ratio_hook import SSNRatioHook, importance_scalars

# Drawing takes longer than these runs: the tests of the report do it.
HOOKS = (dict(type='SSNRadiusHook'), dict(type='SSNRatioHook', interval=5, report=False))


def tensorboard():
    """A visualizer for one run: building it writes the folder of the run into the dict."""
    return dict(type='Visualizer', vis_backends=[dict(type='TensorboardVisBackend')])


def set_control(layer, mean, var):
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor(mean))
        layer.var_weight.copy_(torch.tensor(var))


def scalars_of(runner):
    """Tag -> [(step, value), ...] of the TensorBoard event file of a run."""
    (file,) = Path(runner.work_dir).rglob('events.out.tfevents.*')
    events = EventAccumulator(str(file), size_guidance=dict(scalars=0)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()['scalars']
    }


class Ratios(Hook):
    """Notes the ratios after every iteration, before the hook under test could look at them."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.history = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = runner.model
        self.history.append(
            {
                f'ssn/{name}/{statistic}/{normalizer}': ratio
                for name in ('norm1', 'norm2')
                for statistic in ('mean', 'var')
                for normalizer, ratio in zip(
                    getattr(model, name).normalizers,
                    getattr(getattr(model, name), f'{statistic}_ratios').tolist(),
                    strict=True,
                )
            }
        )


# ---------------------------------------------------------------- the numbers


def test_hand_worked_ratios():
    model = nn.Sequential(SSN(4), nn.Sequential(SSN(4)))
    # at radius 0 these are sparsemax: (.6, .4, -.3) -> (.6, .4, 0), (1.5, 0, 0) -> (1, 0, 0)
    set_control(model[0], [0.6, 0.4, -0.3], [1.5, 0.0, 0.0])
    set_control(model[1][0], [0.0, 0.0, 2.0], [0.0, 2.0, 0.0])
    summary, per_layer = importance_scalars(model, layer_ratios(model))
    assert per_layer == pytest.approx(
        {
            'ssn/0/mean/IN': 0.6, 'ssn/0/mean/LN': 0.4, 'ssn/0/mean/BN': 0.0,
            'ssn/0/var/IN': 1.0, 'ssn/0/var/LN': 0.0, 'ssn/0/var/BN': 0.0,
            'ssn/1.0/mean/IN': 0.0, 'ssn/1.0/mean/LN': 0.0, 'ssn/1.0/mean/BN': 1.0,
            'ssn/1.0/var/IN': 0.0, 'ssn/1.0/var/LN': 1.0, 'ssn/1.0/var/BN': 0.0,
        },
        abs=1e-6,
    )  # fmt: skip
    assert summary == pytest.approx(
        dict(ssn_radius=0.0, ssn_decided=1.0, ssn_IN=0.4, ssn_LN=0.35, ssn_BN=0.25), abs=1e-6
    )
    assert all(type(value) is float for value in (*summary.values(), *per_layer.values()))


def test_radius_is_the_largest_of_the_model():
    model = nn.Sequential(SSN(4, radius=0.2), SSN(4), SSN(4))
    model[0].requires_grad_(False)  # a frozen stage keeps its radius
    set_radius(model, 0.5)
    assert [layer.radius.item() for layer in model] == pytest.approx([0.2, 0.5, 0.5])
    assert importance_scalars(model, layer_ratios(model))[0]['ssn_radius'] == 0.5
    assert importance_scalars(model, layer_ratios(model))[0]['ssn_decided'] == 0
    set_radius(model, 1.0)
    assert importance_scalars(model, layer_ratios(model))[0]['ssn_radius'] == 1.0
    assert importance_scalars(model, layer_ratios(model))[0]['ssn_decided'] == 2


def test_radius_of_a_frozen_stage_does_not_count():
    # Pretrained weights bring the radius at the end of their own schedule.
    model = nn.Sequential(SSN(4, radius=1.0), SSN(4)).requires_grad_(False)
    assert importance_scalars(model, layer_ratios(model))[0]['ssn_radius'] == 1.0
    model[1].requires_grad_(True)
    set_radius(model, 0.25)
    assert importance_scalars(model, layer_ratios(model))[0]['ssn_radius'] == 0.25


def test_layers_of_different_candidates():
    model = nn.Sequential(
        SSN(4, normalizers=('IN', 'BN')),
        SN(4, normalizers=('IN', 'LN')),
        SSN(4, normalizers=('IN', 'LN', 'BN', 'GN'), num_groups=2, radius=0.3),
    )
    set_control(model[0], [0.7, 0.3], [0.2, 0.8])
    summary, per_layer = importance_scalars(model, layer_ratios(model))
    assert list(per_layer) == [
        f'ssn/{i}/{statistic}/{normalizer}'
        for i, names in enumerate((('IN', 'BN'), ('IN', 'LN'), ('IN', 'LN', 'BN', 'GN')))
        for statistic in ('mean', 'var')
        for normalizer in names
    ]
    assert per_layer['ssn/0/mean/IN'] == pytest.approx(0.7)
    assert per_layer['ssn/0/var/BN'] == pytest.approx(0.8)
    assert per_layer['ssn/1/var/LN'] == pytest.approx(0.5)
    last = {key: per_layer[f'ssn/2/mean/{key}'] for key in ('IN', 'LN', 'BN', 'GN')}
    assert list(last.values()) == pytest.approx(model[2].mean_ratios.tolist())
    # averaged over all layers, so that the shares sum to one
    assert summary['ssn_GN'] == pytest.approx(last['GN'] / 3)
    assert summary['ssn_LN'] == pytest.approx((0.5 + last['LN']) / 3)
    shares = [summary[f'ssn_{name}'] for name in ('IN', 'LN', 'BN', 'GN')]
    assert sum(shares) == pytest.approx(1)
    assert summary['ssn_radius'] == pytest.approx(0.3)


def test_sn_alone_has_ratios_and_no_radius():
    model = nn.Sequential(SN(4), SN(4))
    set_control(model[0], [0.0, 0.0, 0.0], [50.0, 0.0, 0.0])
    summary, per_layer = importance_scalars(model, layer_ratios(model))
    assert summary['ssn_radius'] == 0
    assert summary['ssn_decided'] == 0  # two statistics make a layer
    assert summary['ssn_BN'] == pytest.approx((3 / 3 + 0) / 4, abs=1e-6)
    assert len(per_layer) == 12


def test_model_without_such_layers():
    assert importance_scalars(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), []) == ({}, {})


@pytest.mark.parametrize('interval', [0, -1, 2.0, '5', None, True])
def test_bad_interval_is_named(interval):
    with pytest.raises(ValueError, match='interval') as raised:
        SSNRatioHook(interval=interval)
    assert repr(interval) in str(raised.value)


# ---------------------------------------------------------------- when and where they go


@pytest.mark.parametrize(
    ('interval', 'max_iters', 'expected'),
    [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (5, 10, [5, 10]), (50, 7, [7])],
)
def test_recorded_every_interval_and_after_the_last(interval, max_iters, expected):
    hook = SSNRatioHook(interval)
    runner = Mock(model=nn.Sequential(SSN(2)), max_iters=max_iters, hooks=[])
    for runner.iter in range(max_iters):
        hook.after_train_iter(runner, batch_idx=0)
    steps = [call.kwargs['step'] for call in runner.visualizer.add_scalars.call_args_list]
    assert steps == expected
    names = [call.args[0] for call in runner.message_hub.update_scalar.call_args_list]
    assert names.count('train/ssn_radius') == names.count('train/ssn_decided') == len(expected)


def test_names_are_the_models_and_not_its_wrappers():
    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = MMDistributedDataParallel(nn.Sequential(SSN(2)), device_ids=None)
        runner = Mock(model=wrapped, iter=0, max_iters=1, hooks=[])
        SSNRatioHook().after_train_iter(runner, batch_idx=0)
        (scalars,) = runner.visualizer.add_scalars.call_args.args
        assert 'ssn/0/mean/IN' in scalars
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('interval', [1, 3], ids=lambda interval: f'every {interval}')
@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_every_log_line_is_of_its_own_iteration(make_runner, by_epoch, interval):
    """Also between the records, which are of every fifth iteration."""
    logger = dict(type='LoggerHook', interval=interval)
    runner = make_runner(by_epoch, hooks=HOOKS, default_hooks=dict(logger=logger))
    runner.train()
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    lines = re.findall(r'(?:Iter|Epoch)\(train\).*', log)
    told = range(interval - 1, 12, interval)
    if by_epoch and interval == 3:  # counted in each epoch of 4 iterations
        told = [2, 6, 10]
    assert len(lines) == len(told)
    for line, iteration in zip(lines, told, strict=True):
        radius = float(re.search(r'ssn_radius: ([\d.]+)', line)[1])
        assert radius == pytest.approx(iteration / 11, abs=1e-4)
        ratios = dict(re.findall(r'ssn_([ILB]N): ([\d.]+)', line))
        assert set(ratios) == {'IN', 'LN', 'BN'}
        assert sum(map(float, ratios.values())) == pytest.approx(1, abs=1e-3)
    assert re.search(r'ssn_decided: ([\d.]+)', lines[-1])[1] == '2.0000'


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_tensorboard_holds_every_layer(make_runner, by_epoch):
    runner = make_runner(by_epoch, hooks=HOOKS, visualizer=tensorboard())
    spy = Ratios()
    runner.register_hook(spy)
    runner.train()
    scalars = scalars_of(runner)
    per_layer = {tag: values for tag, values in scalars.items() if tag.startswith('ssn/')}
    assert set(per_layer) == set(spy.history[0])
    assert len(per_layer) == 2 * 2 * 3
    for tag, values in per_layer.items():
        assert [step for step, _ in values] == [5, 10, 12]
        assert [value for _, value in values] == pytest.approx(
            [spy.history[step - 1][tag] for step, _ in values]
        )
    assert sorted(values[-1][1] for values in per_layer.values()) == [0.0] * 8 + [1.0] * 4
    # the summary comes along with the log lines, here one per iteration
    assert scalars['ssn_radius'][-1] == (12, 1.0)
    assert scalars['ssn_decided'][-1] == (12, 2.0)
    assert dict(scalars['ssn_radius'])[5] == pytest.approx(4 / 11)


def test_last_iteration_is_recorded_where_the_logger_prints_nothing(make_runner):
    runner = make_runner(
        hooks=HOOKS,
        visualizer=tensorboard(),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=50)),
    )
    runner.train()
    history = runner.message_hub.get_scalar('train/ssn_radius')
    assert history.data[1].sum() == 4  # iterations 5, 10 and 12, and 4, which mmengine does print
    assert history.current() == 1.0
    assert runner.message_hub.get_scalar('train/ssn_decided').current() == 2.0
    assert [step for step, _ in scalars_of(runner)['ssn/norm1/mean/BN']] == [5, 10, 12]


@pytest.mark.parametrize(
    'model',
    [
        dict(type='ToyNet', norm_cfg=dict(type='SN')),
        dict(
            type='ToyNet',
            norm_cfg=dict(type='SSN', normalizers=('IN', 'BN')),
            second_norm_cfg=dict(type='SN', normalizers=('IN', 'LN', 'BN', 'GN'), num_groups=2),
        ),
    ],
    ids=['SN_only', 'mixed'],
)
def test_run_with_other_layers(make_runner, model):
    runner = make_runner(hooks=HOOKS, visualizer=tensorboard(), model=model)
    spy = Ratios()
    runner.register_hook(spy)
    runner.train()
    scalars = scalars_of(runner)
    for tag, ratio in spy.history[-1].items():
        assert scalars[tag][-1] == (12, pytest.approx(ratio))
    has_ssn = model['norm_cfg']['type'] == 'SSN'
    assert scalars['ssn_radius'][-1] == (12, float(has_ssn))
    assert scalars['ssn_decided'][-1] == (12, float(has_ssn))


def test_run_without_such_layers(make_runner):
    runner = make_runner(
        hooks=[dict(type='SSNRatioHook')],
        visualizer=tensorboard(),
        model=dict(type='ToyNet', norm_cfg=dict(type='BN')),
    )
    runner.train()
    assert not {'ratios.jsonl', 'report.html'} & set(os.listdir(runner.work_dir))
    scalars = scalars_of(runner)
    assert 'loss' in scalars
    assert not [tag for tag in scalars if tag.startswith('ssn')]


# ---------------------------------------------------------------- ratios.jsonl


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_history_of_a_run(make_runner, by_epoch):
    runner = make_runner(by_epoch, hooks=HOOKS)
    spy = Ratios()
    runner.register_hook(spy)
    losses = []
    runner.model.register_forward_hook(lambda *args: losses.append(float(args[2]['loss'])))
    runner.train()
    history = read_history(Path(runner.work_dir))
    assert history.about['max_iters'] == 12
    assert history.about['versions']['torch'] == torch.__version__
    assert [line['iter'] for line in history.lines] == [5, 10, 12]
    assert [line['decided'] for line in history.lines] == [0, 2, 2]
    assert [line['radius'] for line in history.lines] == pytest.approx([4 / 11, 9 / 11, 1])
    assert [layer['layer'] for layer in history.layers] == ['norm1', 'norm2']
    for index, line in enumerate(history.lines):
        recorded = spy.history[line['iter'] - 1]
        for row in history.rows(index):
            for statistic in ('mean', 'var'):
                for name, ratio in row.ratios(statistic).items():
                    expected = recorded[f'ssn/{row.layer}/{statistic}/{name}']
                    assert ratio == pytest.approx(expected, abs=1e-6)
    expected = [sum(losses[:5]) / 5, sum(losses[5:10]) / 5, sum(losses[7:12]) / 5]
    assert [line['loss'] for line in history.lines] == pytest.approx(expected)
    assert history.rows() == layer_ratios(runner.model)


def test_history_of_a_resumed_run(make_runner):
    hooks = (dict(type='SSNRadiusHook'), dict(type='SSNRatioHook', interval=1, report=False))
    runner = make_runner(hooks=hooks)
    runner.train()
    path = Path(runner.work_dir) / 'ratios.jsonl'
    whole = read_history(path)
    resumed = make_runner(
        hooks=hooks,
        work_dir=runner.work_dir,
        load_from=str(Path(runner.work_dir) / 'iter_7.pth'),
        resume=True,
    )
    resumed.train()
    again = read_history(path)
    assert [line['iter'] for line in again.lines] == list(range(1, 13))
    assert again.lines[:7] == whole.lines[:7]
    assert again.layers == whole.layers


def test_other_processes_write_no_history(make_runner, monkeypatch):
    monkeypatch.setattr('ssn_plugin.engine.hooks.ratio_hook.is_main_process', lambda: False)
    runner = make_runner(hooks=HOOKS)
    runner.train()
    assert 'ratios.jsonl' not in os.listdir(runner.work_dir)
    assert runner.message_hub.get_scalar('train/ssn_decided').current() == 2


def test_a_history_that_cannot_be_written_is_one_warning(make_runner, tmp_path):
    runner = make_runner(hooks=HOOKS)
    (Path(runner.work_dir) / 'ratios.jsonl').mkdir()
    runner.train()
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert log.count('SSNRatioHook: cannot write') == 1
    assert runner.iter == 12


def test_a_history_that_disappears_is_one_warning(make_runner):
    class Remove(Hook):
        priority = 'VERY_HIGH'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 6:
                path = Path(runner.work_dir) / 'ratios.jsonl'
                path.unlink()
                path.mkdir()

    runner = make_runner(hooks=HOOKS)
    runner.register_hook(Remove())
    runner.train()
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert log.count('any more, so it stops doing so') == 1
    assert runner.iter == 12


def test_one_synchronisation_per_interval(make_runner, monkeypatch):
    """Ratios become numbers in the interval's iterations alone, by one transfer each."""
    reads = []
    original = torch.Tensor.tolist

    def counted(tensor):
        reads.append(tensor.numel())
        return original(tensor)

    model = nn.Sequential(SSN(4), SSN(4), SN(4))
    monkeypatch.setattr(torch.Tensor, 'tolist', counted)
    hook = SSNRatioHook(interval=5)
    runner = Mock(model=model, max_iters=10, hooks=[])
    for runner.iter in range(10):
        hook.after_train_iter(runner, batch_idx=0)
    assert reads == [2 * 6 + 2 * 3 + 6] * 2


# ---------------------------------------------------------------- the end of a training


def test_figures_and_report_at_the_end(make_runner):
    runner = make_runner(
        hooks=(dict(type='SSNRadiusHook'), dict(type='SSNRatioHook', interval=1)),
        visualizer=dict(
            type='Visualizer',
            vis_backends=[dict(type='TensorboardVisBackend'), dict(type='LocalVisBackend')],
        ),
    )
    runner.train()
    names = {'ssn_selection', 'ssn_shares', 'ssn_history', 'ssn_simplex'}
    (file,) = Path(runner.work_dir).rglob('events.out.tfevents.*')
    events = EventAccumulator(str(file), size_guidance=dict(images=0)).Reload()
    assert set(events.Tags()['images']) == names
    for name in names:
        (event,) = events.Images(name)
        assert event.step == 12
        (local,) = Path(runner.work_dir).rglob(f'vis_image/{name}_12.png')
        with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
            drawn = np.asarray(picture.convert('RGB'))
        assert np.array_equal(drawn, np.asarray(Image.open(local).convert('RGB')))
        assert drawn.std() > 10
    report = (Path(runner.work_dir) / 'report.html').read_text()
    assert '2 of 2 layers are one normalizer' in report
    assert 'ended after 12 iterations' in report
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert 'SSNRatioHook: the report is ' in log


def test_a_report_that_fails_is_one_warning(make_runner):
    runner = make_runner(hooks=(dict(type='SSNRadiusHook'), dict(type='SSNRatioHook')))
    (Path(runner.work_dir) / 'report.html').mkdir()
    runner.train()
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    (line,) = (line for line in log.splitlines() if 'no report of' in line)
    assert 'WARNING' in line
    assert 'Traceback' not in log
    assert sorted(os.listdir(Path(runner.work_dir) / 'report.html')) == []
    assert not list(Path(runner.work_dir).glob('.report*'))


# ---------------------------------------------------------------- several runs, full disks


def log_of(runner) -> str:
    return next(Path(runner.work_dir).glob('*/*.log')).read_text()


def test_two_runs_in_one_folder(make_runner, tmp_path):
    folder = str(tmp_path / 'shared')
    hooks = (dict(type='SSNRadiusHook'), dict(type='SSNRatioHook', interval=4, report=False))
    first = make_runner(hooks=hooks, work_dir=folder)
    first.train()
    second = make_runner(hooks=hooks, work_dir=folder, train_cfg=dict(by_epoch=False, max_iters=8))
    second.train()
    history = read_history(Path(folder))
    assert len(history.runs) == 2
    assert [line['iter'] for line in history.lines] == [4, 8]
    earlier = read_history(Path(folder), history.runs[0])
    assert [line['iter'] for line in earlier.lines] == [4, 8, 12]
    assert earlier.about['max_iters'] == 12
    logs = [path.read_text() for path in Path(folder).glob('*/*.log')]
    assert sum(text.count('has 1 other runs') for text in logs) == 1
    # The first is resumed: it goes on with its own lines, and those of the second stay.
    resumed = make_runner(
        hooks=hooks, work_dir=folder, load_from=f'{folder}/iter_8.pth', resume=True
    )
    # iter_8.pth is of the second run, which has 12 iterations now
    resumed.train()
    history = read_history(Path(folder))
    assert [line['iter'] for line in history.lines] == [4, 8, 12]
    assert read_history(Path(folder), history.runs[0]).lines == earlier.lines


def test_two_runs_at_once_are_told_apart(make_runner, tmp_path):
    """Each appends to the file that the other has begun anew."""
    folder = str(tmp_path / 'shared')

    class Meanwhile(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 5:
                other = make_runner(hooks=hooks, work_dir=folder)
                other.train()

    hooks = (dict(type='SSNRadiusHook'), dict(type='SSNRatioHook', interval=4, report=False))
    runner = make_runner(hooks=hooks, work_dir=folder)
    runner.register_hook(Meanwhile())
    runner.train()
    runs = read_history(Path(folder)).runs
    assert len(runs) == 2
    for run in runs:
        history = read_history(Path(folder), run)
        assert [line['iter'] for line in history.lines] == [4, 8, 12]


def test_a_full_disk_between_checkpoints(make_runner, monkeypatch):
    """LoggerHook writes by the same visualizer as SSNRatioHook; both go on without it."""
    runner = make_runner(
        hooks=HOOKS,
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
    )
    calls = []

    def full(self, *args, **kwargs):
        calls.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalVisBackend, '_dump', full)
    runner.train()
    assert runner.iter == 12
    assert len(calls) >= 12
    assert log_of(runner).count('the visualizer cannot write') == 1
    assert 'No space left on device' in log_of(runner)


def test_other_errors_of_a_visualizer_are_errors(make_runner, monkeypatch):
    runner = make_runner(
        hooks=HOOKS,
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
    )

    def wrong(self, *args, **kwargs):
        raise ValueError('wrong')

    monkeypatch.setattr(LocalVisBackend, '_dump', wrong)
    with pytest.raises(ValueError, match='wrong'):
        runner.train()


def test_a_log_that_cannot_be_written_is_one_line(make_runner, capsys):
    runner = make_runner(hooks=HOOKS)

    class Full(Hook):
        priority = 'VERY_LOW'

        def before_train(self, runner):
            (handler,) = (h for h in runner.logger.handlers if isinstance(h, logging.FileHandler))
            stream = open('/dev/full', 'w')  # noqa: SIM115
            handler.setStream(stream)

    if not Path('/dev/full').exists():
        pytest.skip('no /dev/full')
    runner.register_hook(Full())
    runner.train()
    told = capsys.readouterr().err
    assert runner.iter == 12
    assert told.count('.log: cannot be written: No space left on device') == 1
    assert 'Traceback' not in told
