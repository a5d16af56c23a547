"""ratios.jsonl: what is written is read again, through kills and resumed runs."""

import json
import math

import pytest

from ssn_plugin.analysis.history import (
    HistoryError,
    append_to_history,
    read_history,
    start_history,
)
from ssn_plugin.analysis.layer_ratios import LayerRatios

ROWS = [
    LayerRatios('sn1', ('IN', 'LN', 'BN'), (0.2, 0.5, 0.3), (0, 0, 1.0), 0.5, False, True, 64),
    LayerRatios('sn2', ('IN', 'BN'), (0.25, 0.75), (0.5, 0.5), None, channels=8),
]


LAYER = dict(layer='sn1', normalizers=['IN', 'LN', 'BN'], channels=64, sparse=True)


def write(path, iterations, start=0):
    start_history(path, ROWS, {'torch': '2'}, start)
    for iteration in iterations:
        append_to_history(path, iteration, ROWS, 0.5, iteration / 10)


def iterations(path):
    return [line['iter'] for line in read_history(path).lines]


def test_rows_come_back(tmp_path):
    path = tmp_path / 'ratios.jsonl'
    write(path, [10, 20])
    history = read_history(tmp_path)
    assert history.about == {'torch': '2'}
    assert history.rows() == history.rows(0) == ROWS
    assert [line['loss'] for line in history.lines] == [1, 2]
    assert [line['decided'] for line in history.lines] == [0, 0]
    assert len(path.read_text().splitlines()) == 3


def test_nearly_one_is_not_one(tmp_path):
    path = tmp_path / 'ratios.jsonl'
    row = ROWS[1]._replace(mean_ratios=(1 - 1e-8, 1e-8), var_ratios=(0.0, 1.0))
    start_history(path, [row], {})
    append_to_history(path, 1, [row], 0.5, math.nan)
    history = read_history(path)
    assert not history.rows()[0].decided
    assert history.rows()[0].mean_ratios == pytest.approx(row.mean_ratios, abs=1e-6)
    assert history.lines[0]['loss'] is None
    json.loads(path.read_text().splitlines()[1], parse_constant=pytest.fail)  # no NaN in it


@pytest.mark.parametrize(
    'change',
    [
        lambda line: line.pop('iter'),
        lambda line: line.pop('loss'),
        lambda line: line.pop('var_fixed'),
        lambda line: line.update(iter='5'),
        lambda line: line['mean'].pop(),
        lambda line: line['var'][1].append(0.0),
        lambda line: line.update(mean=0.5),
        lambda line: line.update(run={}),
        lambda line: line.update(radius='x'),
        lambda line: line.update(loss=[]),
        lambda line: line.update(decided={}),
        lambda line: line.update(mean_fixed=['x', 0]),
        lambda line: line['var'].__setitem__(0, ['x', 0.0, 1.0]),
    ],
)
def test_a_line_that_is_no_record(tmp_path, change):
    path = tmp_path / 'ratios.jsonl'
    write(path, [10, 20])
    first, second, third = path.read_text().splitlines()
    line = json.loads(second)
    change(line)
    path.write_text('\n'.join([first, json.dumps(line), third]))
    with pytest.raises(HistoryError, match='line 2 is no record of SSNRatioHook') as raised:
        read_history(path)
    assert '\n' not in str(raised.value)


def test_a_resumed_run_goes_on(tmp_path):
    path = tmp_path / 'ratios.jsonl'
    write(path, [10, 20, 30])
    path.write_text(path.read_text() + '{"iter": 40, "radi')  # a kill in the middle of a line
    assert iterations(path) == [10, 20, 30]
    write(path, [30, 40], start=20)
    assert iterations(path) == [10, 20, 30, 40]


def test_a_new_run_starts_again(tmp_path):
    path = tmp_path / 'ratios.jsonl'
    write(path, [10, 20])
    write(path, [5])
    assert iterations(path) == [5]


def test_lines_of_other_layers_are_dropped(tmp_path):
    path = tmp_path / 'ratios.jsonl'
    write(path, [10])
    start_history(path, ROWS[:1], {}, 10)
    assert iterations(path) == []
    path.write_text('no history')
    start_history(path, ROWS, {}, 10)
    assert iterations(path) == []


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        (None, 'no such file; SSNRatioHook writes it'),
        ('', 'is no history of SSNRatioHook'),
        ('{"iter": 1}\n', 'is no history of SSNRatioHook'),
        ('{"layers": [5]}\n', 'is no history of SSNRatioHook'),
        ('[' * 100_000, 'is no history of SSNRatioHook'),
        *(
            (json.dumps({'layers': [LAYER | {name: bad}]}), 'is no history of SSNRatioHook')
            for name in LAYER
            for bad in (5.5, {}, ['IN', 5])
        ),
        ('{"layers": []}\nnonsense\n{"iter": 1}\n', 'line 2 is no record of SSNRatioHook'),
    ],
)
def test_what_is_no_history(tmp_path, text, said):
    path = tmp_path / 'ratios.jsonl'
    if text is not None:
        path.write_text(text)
    with pytest.raises(HistoryError, match=said) as raised:
        read_history(path)
    assert str(path) in str(raised.value)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('about', [5, 'x', None, {'max_iters': 'x'}, {'versions': 5}])
def test_facts_that_are_none(tmp_path, about):
    path = tmp_path / 'ratios.jsonl'
    path.write_text(json.dumps({'layers': [LAYER], 'about': about}))
    assert read_history(path).about == {}
