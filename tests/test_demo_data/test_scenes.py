"""Scenes: masks say exactly which object is seen, and a scene depends on its arguments alone."""

import itertools

import numpy as np
import pytest

from demo_data import scenes
from demo_data.backgrounds import load_backgrounds
from demo_data.cutouts import load_cutouts


@pytest.fixture(scope='module')
def material():
    return load_cutouts(), load_backgrounds()


def compose(material, split='train', index=0, width=160, height=128, seed=0):
    cutouts, backgrounds = material
    return scenes.compose_scene(
        split, index, cutouts[split], backgrounds[split], width=width, height=height, seed=seed
    )


def test_a_scene_depends_on_split_index_and_seed_only(material):
    first = compose(material, index=3)
    compose(material, index=4)
    again = compose(material, index=3)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.segmentation(), again.segmentation())
    for other in (
        compose(material, index=4),
        compose(material, index=3, seed=1),
        compose(material, split='val', index=3),
    ):
        assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize(('width', 'height'), [(96, 64), (160, 128), (320, 256)])
def test_size_and_number_of_objects(material, width, height):
    for index in range(8):
        scene = compose(material, index=index, width=width, height=height)
        assert scene.image.shape == (height, width, 3)
        assert scene.image.dtype == np.uint8
        assert 2 <= len(scene.instances) <= 5
        for instance in scene.instances:
            rows, columns = np.nonzero(instance.mask)
            assert max(np.ptp(rows), np.ptp(columns)) + 1 <= 72 * width / 160 + 1


def test_masks_are_disjoint_and_agree_with_the_segmentation(material):
    for index in range(8):
        scene = compose(material, index=index)
        assert sum(instance.mask.astype(int) for instance in scene.instances).max() == 1
        labels = scene.segmentation()
        for instance in scene.instances:
            assert (labels[instance.mask] == instance.label + 1).all()
        assert (labels > 0).sum() == sum(instance.mask.sum() for instance in scene.instances)


def test_visible_masks_are_what_the_picture_shows(material, monkeypatch):
    """Objects become squares of one colour each, so that the picture tells who is where."""
    counter = itertools.count(1)
    side = 60

    def square(cutout, wanted_side, rng):
        return np.full((side, side, 3), next(counter), np.float32), np.ones((side, side))

    monkeypatch.setattr(scenes, 'pose', square)
    hidden = 0
    for index in range(12):
        scene = compose(material, index=index)
        for instance in scene.instances:
            colours = np.unique(scene.image[instance.mask])
            assert len(colours) == 1
            np.testing.assert_array_equal(
                (scene.image == colours[0]).all(axis=-1) & (scene.segmentation() > 0), instance.mask
            )
            share = instance.mask.sum() / side**2
            assert 0.3 <= share <= 1
            hidden += share < 1
        counter = itertools.count(1)
    assert hidden > 5  # overlaps do occur


def test_objects_differ_from_the_background_inside_their_masks(material):
    """Each instance has been drawn: repainting with another background keeps its pixels."""
    cutouts, backgrounds = material
    scene = compose(material, index=2)
    flat = [
        type(background)(
            background.name, background.region, background.pixels * 0, background.scale
        )
        for background in backgrounds['train']
    ]
    black = scenes.compose_scene('train', 2, cutouts['train'], flat, width=160, height=128, seed=0)
    np.testing.assert_array_equal(scene.segmentation(), black.segmentation())
    for instance in black.instances:
        # at least half of each pixel is the object, none of which is black
        assert black.image[instance.mask].sum(axis=-1).mean() > 60
    assert black.image[black.segmentation() == 0].mean() < 3  # only soft rims


def test_specks_are_left_out_of_shrunken_objects():
    mask = np.zeros((40, 40), dtype=bool)
    mask[5:25, 5:25] = True  # body
    mask[30:36, 30:36] = True  # a wheel: 8 % of all
    mask[2, 38] = True  # a speck
    near = scenes._near_body(mask)
    assert near[4, 4]
    assert near[33, 33]
    assert not near[2, 38]
