"""ADE20K layout: zero is kept for unlabeled pixels; mmseg's stock classes read it."""

import numpy as np
import pytest
from PIL import Image

from demo_data.classes import SEG_CLASSES, SEG_PALETTE

PREFIX = dict(img_path='images/validation', seg_map_path='annotations/validation')
PIPELINE = [dict(type='LoadImageFromFile'), dict(type='mmseg.LoadAnnotations')]


def train_ids(root, index):
    name = f'demo_{index:06d}_000000_gtFine_labelTrainIds.png'
    with Image.open(root / 'cityscapes' / 'gtFine' / 'val' / 'demo' / name) as image:
        return np.array(image)


def test_labels_are_the_train_ids_plus_one(demo_root, num_scenes):
    folder = demo_root / 'ade' / 'annotations' / 'validation'
    assert len(list(folder.iterdir())) == num_scenes['val']
    for index in range(num_scenes['val']):
        with Image.open(folder / f'ADE_val_{index + 1:08d}.png') as image:
            np.testing.assert_array_equal(np.array(image), train_ids(demo_root, index) + 1)


@pytest.mark.parametrize('true_names', [False, True])
def test_stock_datasets_of_mmseg(demo_root, num_scenes, true_names):
    pytest.importorskip('mmseg')
    from mmseg.datasets import ADE20KDataset, BaseSegDataset

    arguments = dict(
        data_root=str(demo_root / 'ade'), data_prefix=PREFIX, pipeline=PIPELINE, test_mode=True
    )
    if true_names:
        dataset = BaseSegDataset(
            reduce_zero_label=True,
            metainfo=dict(classes=SEG_CLASSES, palette=list(SEG_PALETTE)),
            **arguments,
        )
        assert dataset.metainfo['classes'] == SEG_CLASSES
    else:
        dataset = ADE20KDataset(**arguments)
    assert len(dataset) == num_scenes['val']
    for index, item in enumerate(dataset):
        np.testing.assert_array_equal(item['gt_seg_map'], train_ids(demo_root, index))
