"""Tables, CSV and JSON say what the rows say."""

import csv
import io
import json

from rich.console import Console

from ssn_plugin.analysis.layer_ratios import LayerRatios
from ssn_plugin.analysis.tables import records, selection_table, write_csv, write_json

ROWS = [
    LayerRatios('sn1', ('IN', 'LN', 'BN'), (0.2, 0.5, 0.3), (0, 0, 1.0), 0.5, False, True, 64),
    LayerRatios('layer1.0.sn1', ('IN', 'GN'), (1.0, 0), (0.0, 1.0), None, channels=8),
]


def test_records():
    found = records(ROWS)
    assert [record['statistic'] for record in found] == ['mean', 'var'] * 2
    assert found[1] == dict(
        depth=1, layer='sn1', stage='stem', kind='stem', channels=64, statistic='var',
        ratios={'IN': 0, 'LN': 0, 'BN': 1}, selected='BN', fixed=True, radius=0.5,
    )  # fmt: skip
    assert found[0]['selected'] is None
    assert (found[2]['stage'], found[2]['depth'], found[2]['radius']) == ('layer1', 2, None)


def test_json_is_the_records(tmp_path):
    write_json({'a': ROWS, 'b': ROWS[:1]}, tmp_path / 'x.json')
    assert json.loads((tmp_path / 'x.json').read_text()) == {
        'a': records(ROWS),
        'b': records(ROWS[:1]),
    }


def test_csv_has_a_column_per_candidate(tmp_path):
    write_csv({'a': ROWS, 'b': ROWS[:1]}, tmp_path / 'x.csv')
    with (tmp_path / 'x.csv').open(newline='') as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert lines[0] == dict(
        source='a', depth='1', layer='sn1', stage='stem', kind='stem', channels='64',
        statistic='mean', IN='0.2', LN='0.5', BN='0.3', GN='', selected='', fixed='0', radius='0.5',
    )  # fmt: skip
    assert (lines[3]['GN'], lines[3]['BN'], lines[3]['selected']) == ('1.0', '', 'GN')
    assert lines[5]['source'] == 'b'
    assert [path.name for path in tmp_path.iterdir()] == ['x.csv']


def test_table_shows_what_is_decided_and_ratios_of_the_rest():
    console = Console(file=io.StringIO(), width=100)
    console.print(selection_table(ROWS, 'Two layers'))
    text = console.file.getvalue()
    assert 'Two layers' in text
    first, second = (line for line in text.splitlines() if 'sn1' in line)
    assert 'IN 20 LN 50 BN 30' in first
    assert 'variance' in first
    assert second.split()[1:] == ['2', '│', '8', '│', 'layer1', '│', '0.sn1', '│', 'IN', '│', 'GN',
                                  '│', '│']  # fmt: skip
