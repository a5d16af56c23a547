"""Cut-outs: every object is there, its mask has the right shape, and the splits share none."""

from collections import Counter

import numpy as np
import pytest

from demo_data import cutouts
from demo_data.classes import CLASSES, PALETTE, SEG_CLASSES, SEG_PALETTE
from demo_data.photographs import read_disparity, read_photograph


@pytest.fixture(scope='module')
def splits():
    return cutouts.load_cutouts()


def test_class_lists_agree():
    assert SEG_CLASSES[0] == 'background'
    assert SEG_CLASSES[1:] == CLASSES
    assert len(set(SEG_PALETTE)) == len(SEG_CLASSES)
    assert SEG_PALETTE[1:] == PALETTE


def test_number_of_cutouts(splits):
    count = {
        split: Counter(CLASSES[cutout.label] for cutout in members)
        for split, members in splits.items()
    }
    assert count['train'] == {'coin': 18, 'cup': 1, 'horse': 3, 'motorcycle': 1}
    assert count['val'] == {'coin': 6, 'cup': 1, 'horse': 2, 'motorcycle': 1}


def test_only_the_cup_is_in_both_splits(splits):
    train, val = ({cutout.name for cutout in splits[split]} for split in ('train', 'val'))
    assert train & val == {'cup'}


def test_cutouts_are_cropped_and_mostly_opaque(splits):
    for cutout in splits['train'] + splits['val']:
        assert cutout.rgba.dtype == np.uint8
        alpha = cutout.rgba[..., 3]
        for border in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
            assert border.any(), cutout.name
        assert (alpha == 255).mean() > 0.25, cutout.name


def test_coins_are_whole_round_and_apart():
    masks = cutouts._coin_masks(read_photograph('coins'))
    assert sum(mask.astype(int) for mask in masks).max() == 1
    for mask, (x, y, radius) in zip(masks, cutouts._COINS, strict=True):
        area = mask.sum()
        rows, columns = np.nonzero(mask)
        assert np.sqrt(area / np.pi) == pytest.approx(radius, rel=0.06)
        assert columns.mean() == pytest.approx(x, abs=2)
        assert rows.mean() == pytest.approx(y, abs=2)
        # a disc fills pi / 4 of its bounding box; half a coin or one with a bite does not
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert area / box == pytest.approx(np.pi / 4, abs=0.05)


def test_coins_are_brighter_than_the_table_beside_them():
    grey = read_photograph('coins')[..., 0].astype(float)
    for mask, (x, y, radius) in zip(
        cutouts._coin_masks(read_photograph('coins')), cutouts._COINS, strict=True
    ):
        rows, columns = np.indices(mask.shape)
        near = np.hypot(columns - x, rows - y) < 1.25 * radius
        assert grey[mask].mean() > grey[near & ~mask].mean() + 40


def test_motorcycle_masks_show_the_same_object():
    left, right = cutouts._motorcycle_masks(read_disparity())
    assert left.shape == right.shape == (500, 741)
    assert right.sum() == pytest.approx(left.sum(), rel=0.05)
    # the disparity shifts the motorcycle to the left by 38 to 60 pixels and moves no row
    rows_left, columns_left = np.nonzero(left)
    rows_right, columns_right = np.nonzero(right)
    assert 38 < columns_left.mean() - columns_right.mean() < 60
    assert rows_left.mean() == pytest.approx(rows_right.mean(), abs=2)
    # red tank: the red of the photograph dominates inside both masks
    for view, mask in (('left', left), ('right', right)):
        tank = read_photograph(f'motorcycle_{view}')[mask]
        assert (tank[:, 0] > 2 * tank[:, 1].astype(int)).mean() > 0.15
