"""Cityscapes layout: label maps agree with each other; mmseg's stock classes read it."""

import numpy as np
import pytest
from PIL import Image

from demo_data.classes import SEG_CLASSES, SEG_PALETTE

PREFIX = dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='mmseg.LoadAnnotations'),
    dict(type='mmseg.RandomCrop', crop_size=(96, 96), cat_max_ratio=0.99),
    dict(type='mmseg.RandomFlip', prob=0.5),
    dict(type='mmseg.PackSegInputs'),
]


def read_map(root, index, kind):
    name = f'demo_{index:06d}_000000_gtFine_{kind}.png'
    with Image.open(root / 'cityscapes' / 'gtFine' / 'train' / 'demo' / name) as image:
        return np.array(image)


def test_the_three_label_maps_agree(demo_root, num_scenes):
    for index in range(num_scenes['train']):
        train_ids = read_map(demo_root, index, 'labelTrainIds')
        label_ids = read_map(demo_root, index, 'labelIds')
        instance_ids = read_map(demo_root, index, 'instanceIds')
        assert train_ids.dtype == label_ids.dtype == np.uint8
        assert train_ids.max() < len(SEG_CLASSES)
        np.testing.assert_array_equal(label_ids, train_ids + 1)
        things = instance_ids >= 1000
        np.testing.assert_array_equal(things, train_ids > 0)
        np.testing.assert_array_equal(
            np.where(things, instance_ids // 1000, instance_ids), label_ids
        )


def test_images_are_those_of_the_other_layouts(demo_root):
    city = demo_root / 'cityscapes' / 'leftImg8bit' / 'train' / 'demo'
    with Image.open(city / 'demo_000000_000000_leftImg8bit.png') as image:
        exact = np.array(image).astype(float)
    coco = demo_root / 'coco' / 'train2017' / '000000000001.jpg'
    ade = demo_root / 'ade' / 'images' / 'training' / 'ADE_train_00000001.jpg'
    assert coco.read_bytes() == ade.read_bytes()
    with Image.open(coco) as image:
        assert np.abs(np.array(image) - exact).mean() < 4  # JPEG's loss


def test_stock_cityscapes_dataset_of_mmseg(demo_root, num_scenes):
    pytest.importorskip('mmseg')
    from mmseg.datasets import CityscapesDataset

    dataset = CityscapesDataset(
        data_root=str(demo_root / 'cityscapes'), data_prefix=PREFIX, pipeline=PIPELINE
    )
    assert len(dataset) == num_scenes['train']
    for item in dataset:
        assert tuple(item['inputs'].shape) == (3, 96, 96)
        assert item['data_samples'].gt_sem_seg.data.max() < len(SEG_CLASSES)


def test_true_class_names_by_base_seg_dataset(demo_root, num_scenes):
    pytest.importorskip('mmseg')
    from mmseg.datasets import BaseSegDataset

    dataset = BaseSegDataset(
        data_root=str(demo_root / 'cityscapes'),
        data_prefix=PREFIX,
        img_suffix='_leftImg8bit.png',
        seg_map_suffix='_gtFine_labelTrainIds.png',
        metainfo=dict(classes=SEG_CLASSES, palette=list(SEG_PALETTE)),
        pipeline=PIPELINE[:2],
    )
    assert len(dataset) == num_scenes['train']
    assert dataset.metainfo['classes'] == SEG_CLASSES
    for index, item in enumerate(dataset):
        np.testing.assert_array_equal(
            item['gt_seg_map'], read_map(demo_root, index, 'labelTrainIds')
        )
