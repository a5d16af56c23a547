"""Write scenes in the layout of Cityscapes: PNG images and gtFine label maps."""

from pathlib import Path

import numpy as np
from PIL import Image

from demo_data.scenes import Scene

CITY = 'demo'
"""Folder and prefix that in Cityscapes name the city."""


def write_cityscapes(root: Path, scene: Scene) -> None:
    """Write the image of a scene and its three label maps.

    * `_labelTrainIds.png`: index into `SEG_CLASSES`; no pixel is 255, the value to ignore;
    * `_labelIds.png`: that index plus one, 0 being unlabeled as in Cityscapes;
    * `_instanceIds.png`, 16 bit: the label id, for objects times 1000 plus their number.
    """
    stem = f'{CITY}_{scene.index:06d}_000000'
    images = root / 'leftImg8bit' / scene.split / CITY
    truth = root / 'gtFine' / scene.split / CITY
    for folder in (images, truth):
        folder.mkdir(parents=True, exist_ok=True)

    train_ids = scene.segmentation()
    label_ids = train_ids + 1
    instance_ids = label_ids.astype(np.uint16)
    for number, instance in enumerate(scene.instances):
        instance_ids[instance.mask] = 1000 * (instance.label + 2) + number

    Image.fromarray(scene.image).save(images / f'{stem}_leftImg8bit.png')
    Image.fromarray(train_ids).save(truth / f'{stem}_gtFine_labelTrainIds.png')
    Image.fromarray(label_ids).save(truth / f'{stem}_gtFine_labelIds.png')
    Image.fromarray(instance_ids).save(truth / f'{stem}_gtFine_instanceIds.png')
