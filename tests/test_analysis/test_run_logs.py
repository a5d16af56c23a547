"""What mmengine logs, read and drawn."""

import json

import pytest

from ssn_plugin.analysis.curves import curves_figure, shown_metrics
from ssn_plugin.analysis.run_logs import read_run_logs


def write(folder, start, lines):
    path = folder / start / 'vis_data'
    path.mkdir(parents=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (path / 'scalars.json').write_text('\n'.join(texts))


def train(step, **values):
    return dict(lr=0.1, loss=1 / step, iter=step, step=step, time=0.5, memory=3, **values)


@pytest.fixture
def logs(tmp_path):
    """A run that was killed after 40 iterations and resumed at 20."""
    write(
        tmp_path,
        '20260101_100000',
        [
            {'ssn/sn1/mean/IN': 0.3, 'step': 10},
            train(10, loss_cls=0.5),
            train(20, loss_cls=0.25),
            {'coco/bbox_mAP': 0.1, 'coco/bbox_mAP_s': 0.1, 'time': 1, 'step': 0},
            train(30),
            train(40),
            {'coco/bbox_mAP': 0.2, 'step': 0},
            '{"lr": 0.1, "los',
        ],
    )
    write(
        tmp_path,
        '20260101_110000',
        [train(30, loss_cls=9.0), train(40), {'coco/bbox_mAP': 0.7, 'mIoU': -1.0, 'step': 2}],
    )
    return read_run_logs(tmp_path)


def test_a_resumed_run_counts_where_it_repeats(logs):
    assert list(logs.train) == [10, 20, 30, 40]
    assert logs.train[30]['loss_cls'] == 9
    assert logs.train[10] == dict(lr=0.1, loss=0.1, loss_cls=0.5)
    assert {i: values['coco/bbox_mAP'] for i, values in logs.val.items()} == {20: 0.1, 40: 0.7}
    assert logs.starts == ['20260101_100000', '20260101_110000']


def test_a_new_training_in_a_used_work_dir(tmp_path):
    old = [train(10, loss_cls=0.5), train(20), {'mIoU': 0.5, 'step': 0}]
    write(tmp_path, '20260101_100000', old)
    write(tmp_path, '20260101_110000', [train(10)])
    logs = read_run_logs(tmp_path)
    assert logs.starts == ['20260101_110000']
    assert logs.train == {10: dict(lr=0.1, loss=0.1)}
    assert logs.val == {}
    # Its first line may be later than some of the old training's: its config tells.
    write(tmp_path, '20260101_120000', [train(15)])
    assert read_run_logs(tmp_path).starts == ['20260101_110000', '20260101_120000']
    config = tmp_path / '20260101_120000' / 'vis_data' / 'config.py'
    config.write_text('load_from = None\nresume = False\n')
    logs = read_run_logs(tmp_path)
    assert logs.starts == ['20260101_120000']
    assert list(logs.train) == [15]


def test_a_validation_before_the_first_iteration_counts(tmp_path):
    write(tmp_path, '20260101_100000', [{'mIoU': 0.5, 'step': 0}, train(10)])
    logs = read_run_logs(tmp_path)
    assert logs.val == {0: {'mIoU': 0.5}}
    assert logs.starts == ['20260101_100000']


def test_curves(logs):
    assert shown_metrics(logs.val) == ['coco/bbox_mAP']
    figure = curves_figure(logs, 'A run')
    drawn = [{line.get_label(): dict(line.get_xydata()) for line in ax.lines} for ax in figure.axes]
    assert drawn[0]['loss'] == pytest.approx({10: 0.1, 20: 0.05, 30: 1 / 30, 40: 0.025})
    assert drawn[0]['loss_cls'] == {10: 0.5, 20: 0.25, 30: 9}
    assert drawn[2] == {'coco/bbox_mAP': {20: 0.1, 40: 0.7}}
    assert [ax.get_ylabel() for ax in figure.axes] == [
        'training loss',
        'learning rate',
        'validation',
    ]


def test_a_folder_without_logs(tmp_path):
    logs = read_run_logs(tmp_path)
    assert logs == ({}, {}, [])
    assert curves_figure(logs, 'None') is None
