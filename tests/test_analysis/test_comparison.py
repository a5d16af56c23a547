"""Differences between models, worked by hand."""

import csv
import io

import pytest
from rich.console import Console

from ssn_plugin.analysis.comparison import aligned, differences, headline, write_comparison
from ssn_plugin.analysis.layer_ratios import LayerRatios
from ssn_plugin.analysis.tables import difference_table

NAMES = ('IN', 'LN', 'BN')
BACKBONE = [
    LayerRatios('sn1', NAMES, (1.0, 0, 0), (0.2, 0.3, 0.5)),
    LayerRatios('layer1.0.sn1', NAMES, (0, 1.0, 0), (0, 0, 1.0)),
]
DETECTOR = [
    LayerRatios('backbone.sn1', NAMES, (0, 0, 1.0), (0.1, 0.2, 0.7)),
    LayerRatios('backbone.layer1.0.sn1', NAMES, (0, 1.0, 0), (0, 0, 1.0)),
    LayerRatios('neck.0.sn', ('IN', 'GN'), (0.5, 0.5), (0, 1.0)),
]
SOURCES = {'pre-trained': BACKBONE, 'fine-tuned': DETECTOR}


def test_layers_are_matched_with_and_without_backbone():
    names, rows = aligned(SOURCES)
    assert names == ['sn1', 'layer1.0.sn1', 'neck.0.sn']
    assert rows['pre-trained'] == [*BACKBONE, None]
    assert rows['fine-tuned'] == DETECTOR


def test_hand_worked_differences():
    found = differences(SOURCES)
    assert [(d.layer, d.statistic, d.leading, d.differs) for d in found] == [
        ('sn1', 'mean', ('IN', 'BN'), True),
        ('sn1', 'var', ('BN', 'BN'), False),
        ('layer1.0.sn1', 'mean', ('LN', 'LN'), False),
        ('layer1.0.sn1', 'var', ('BN', 'BN'), False),
        ('neck.0.sn', 'mean', (None, 'IN'), False),
        ('neck.0.sn', 'var', (None, 'GN'), False),
    ]
    assert [d.distance for d in found] == pytest.approx([1, 0.2, 0, 0, 0, 0])


def test_more_than_two_are_compared_with_the_first():
    third = [BACKBONE[0]._replace(mean_ratios=(0, 0.5, 0.5))]
    found = differences({**SOURCES, 'third': third})[0]
    assert found.leading == ('IN', 'BN', 'LN')
    assert found.distance == 1


def test_layers_that_two_of_three_models_have():
    head = LayerRatios('neck.0.sn', NAMES, (1.0, 0, 0), (0, 0, 1.0))
    sources = {
        'a': BACKBONE,
        'b': [BACKBONE[0], head],
        'c': [BACKBONE[0]._replace(mean_ratios=(0, 0, 1.0)), head._replace(var_ratios=(1.0, 0, 0))],
    }
    said = '1 of 1 common layers prefer another normalizer'
    assert headline(differences(sources)) == f'{said}, and 1 that not all have'
    assert headline(differences({**sources, 'b': BACKBONE[:1]})) == said


def test_different_candidates():
    two = [LayerRatios('sn1', ('IN', 'BN'), (0.5, 0.5), (0, 1.0))]
    assert [d.distance for d in differences({'a': BACKBONE[:1], 'b': two})] == [0.5, 0.5]


def test_table_and_csv(tmp_path):
    found = differences(SOURCES)
    console = Console(file=io.StringIO(), width=100)
    console.print(difference_table(found, list(SOURCES)))
    text = console.file.getvalue()
    assert '1 of 2 common layers prefer another normalizer' in text
    assert 'pre-trained' in text
    assert 'layer1' not in text
    write_comparison(found, list(SOURCES), tmp_path / 'c.csv')
    with (tmp_path / 'c.csv').open(newline='') as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert lines[0] == {
        'layer': 'sn1', 'statistic': 'mean', 'pre-trained': 'IN', 'fine-tuned': 'BN',
        'differs': '1', 'distance': '1.000000',
    }  # fmt: skip
    assert lines[4]['pre-trained'] == ''
