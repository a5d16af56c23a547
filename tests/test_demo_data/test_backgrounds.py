"""Backgrounds: the splits use separate regions, windows have the size of the scene."""

import numpy as np

from demo_data.backgrounds import load_backgrounds
from demo_data.photographs import read_photograph


def test_regions_of_the_splits_do_not_touch():
    splits = load_backgrounds()
    assert [train.name for train in splits['train']] == [val.name for val in splits['val']]
    for train, val in zip(splits['train'], splits['val'], strict=True):
        assert train.region[2] < val.region[0], train.name


def test_pixels_are_those_of_the_region():
    for members in load_backgrounds().values():
        for background in members:
            left, top, right, bottom = background.region
            photograph = read_photograph(background.name)
            np.testing.assert_array_equal(background.pixels, photograph[top:bottom, left:right])


def test_windows_fill_the_scene_at_every_size():
    rng = np.random.default_rng(0)
    for members in load_backgrounds().values():
        for background in members:
            for width, height in ((96, 64), (160, 128), (320, 256)):
                window = background.sample(rng, width, height)
                assert window.shape == (height, width, 3)
                assert window.std() > 1  # a photograph, not an empty canvas
