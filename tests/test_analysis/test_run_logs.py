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
