"""Write scenes in the layout of COCO 2017: images and instance annotations."""

import json
from pathlib import Path

import numpy as np

from demo_data.classes import CLASSES
from demo_data.scenes import Scene


class CocoSplit:
    """One split in COCO's layout, `<split>2017/*.jpg` and `annotations/instances_<split>2017.json`.

    Masks are uncompressed run lengths (`counts` is a list), which are exact where polygons are
    not: masks have holes, and objects in front cut others into parts. pycocotools and mmdet
    (`LoadAnnotations(with_mask=True)`) read them like any other.

    Args:
        root: folder that receives both splits.
        split: 'train' or 'val'.
        first_id: id of the first image and of its first instance; ids differ between splits.
    """

    def __init__(self, root: Path, split: str, first_id: int) -> None:
        self._folder = root / f'{split}2017'
        self._annotation_file = root / 'annotations' / f'instances_{split}2017.json'
        self._first_id = first_id
        self._images: list[dict] = []
        self._annotations: list[dict] = []
        self._folder.mkdir(parents=True, exist_ok=True)
        self._annotation_file.parent.mkdir(exist_ok=True)

    def add(self, scene: Scene, jpeg: bytes) -> None:
        """Write the image of a scene, given as an encoded JPEG, and note its instances."""
        image_id = self._first_id + scene.index
        height, width = scene.image.shape[:2]
        file_name = f'{image_id:012d}.jpg'
        (self._folder / file_name).write_bytes(jpeg)
        self._images.append(
            {'id': image_id, 'file_name': file_name, 'width': width, 'height': height}
        )
        for number, instance in enumerate(scene.instances):
            rows, columns = np.nonzero(instance.mask)
            left, top = int(columns.min()), int(rows.min())
            self._annotations.append(
                {
                    'id': 100 * image_id + number,
                    'image_id': image_id,
                    'category_id': instance.label + 1,
                    'segmentation': {
                        'size': [height, width],
                        'counts': run_lengths(instance.mask),
                    },
                    'area': int(instance.mask.sum()),
                    'bbox': [
                        left,
                        top,
                        int(columns.max()) + 1 - left,
                        int(rows.max()) + 1 - top,
                    ],
                    'iscrowd': 0,
                    'cutout': instance.cutout,
                }
            )

    def close(self) -> None:
        """Write the annotation file."""
        content = {
            'info': {'description': 'ssn_plugin demo data set, see README.md'},
            'licenses': [],
            'categories': [
                {'id': number, 'name': name, 'supercategory': 'object'}
                for number, name in enumerate(CLASSES, 1)
            ],
            'images': self._images,
            'annotations': self._annotations,
        }
        self._annotation_file.write_text(json.dumps(content, separators=(',', ':')) + '\n')


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask in COCO's order: column by column, zeros first.

    Example:
        >>> run_lengths(np.array([[0, 1], [0, 1]], dtype=bool))
        [2, 2]
        >>> run_lengths(np.array([[1, 1], [1, 0]], dtype=bool))
        [0, 3, 1]
    """
    flat = mask.ravel(order='F')
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs
