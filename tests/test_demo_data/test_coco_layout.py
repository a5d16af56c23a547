"""COCO layout: annotations equal the true masks pixel for pixel; mmdet's stock classes read it."""

import json

import numpy as np
import pytest
from PIL import Image

from demo_data.classes import CLASSES, PALETTE
from demo_data.coco_layout import run_lengths

mask_utils = pytest.importorskip('pycocotools.mask')


def annotation_file(root, split):
    return root / 'coco' / 'annotations' / f'instances_{split}2017.json'


def instance_ids(root, split, index):
    name = f'demo_{index:06d}_000000_gtFine_instanceIds.png'
    with Image.open(root / 'cityscapes' / 'gtFine' / split / 'demo' / name) as image:
        return np.array(image)


@pytest.mark.parametrize('kind', ['empty', 'full', 'corner', 'random'])
def test_run_lengths_decode_to_the_mask(kind):
    rng = np.random.default_rng(0)
    mask = {
        'empty': np.zeros((5, 7), bool),
        'full': np.ones((5, 7), bool),
        'corner': np.arange(35).reshape(5, 7) == 34,
        'random': rng.random((5, 7)) < 0.5,
    }[kind]
    rle = mask_utils.frPyObjects({'size': [5, 7], 'counts': run_lengths(mask)}, 5, 7)
    np.testing.assert_array_equal(mask_utils.decode(rle).astype(bool), mask)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_annotations_equal_the_true_masks(demo_root, num_scenes, split):
    coco = json.loads(annotation_file(demo_root, split).read_text())
    assert [category['name'] for category in coco['categories']] == list(CLASSES)
    assert len(coco['images']) == num_scenes[split]
    for index, image in enumerate(coco['images']):
        truth = instance_ids(demo_root, split, index)
        assert truth.shape == (image['height'], image['width'])
        found = [ann for ann in coco['annotations'] if ann['image_id'] == image['id']]
        assert len(found) == len(np.unique(truth[truth >= 1000]))
        for number, annotation in enumerate(found):
            rle = mask_utils.frPyObjects(
                annotation['segmentation'], image['height'], image['width']
            )
            mask = mask_utils.decode(rle).astype(bool)
            instance = 1000 * (annotation['category_id'] + 1) + number
            np.testing.assert_array_equal(mask, truth == instance)
            assert annotation['area'] == mask_utils.area(rle)
            assert annotation['bbox'] == mask_utils.toBbox(rle).tolist()


def test_splits_share_no_id_and_no_held_out_object(demo_root):
    train, val = (json.loads(annotation_file(demo_root, s).read_text()) for s in ('train', 'val'))
    for key in ('images', 'annotations'):
        assert not {item['id'] for item in train[key]} & {item['id'] for item in val[key]}
    shared = {item['cutout'] for item in train['annotations']} & {
        item['cutout'] for item in val['annotations']
    }
    assert shared <= {'cup'}


@pytest.mark.parametrize('split', ['train', 'val'])
def test_stock_dataset_and_pipeline_of_mmdet(demo_root, num_scenes, split):
    pytest.importorskip('mmdet')
    from mmdet.datasets import CocoDataset

    dataset = CocoDataset(
        ann_file=f'annotations/instances_{split}2017.json',
        data_root=str(demo_root / 'coco'),
        data_prefix=dict(img=f'{split}2017/'),
        metainfo=dict(classes=CLASSES, palette=list(PALETTE)),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='mmdet.Resize', scale=(160, 128), keep_ratio=True),
            dict(type='mmdet.RandomFlip', prob=0.0),
            dict(type='mmdet.PackDetInputs'),
        ],
    )
    assert len(dataset) == num_scenes[split]
    for index in range(len(dataset)):
        item = dataset[index]
        assert tuple(item['inputs'].shape) == (3, 128, 160)
        truth = item['data_samples'].gt_instances
        masks = truth.masks.masks.astype(bool)
        ids = instance_ids(demo_root, split, index)
        for number, (mask, label) in enumerate(zip(masks, truth.labels.tolist(), strict=True)):
            np.testing.assert_array_equal(mask, ids == 1000 * (label + 2) + number)
