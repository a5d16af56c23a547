"""Write scenes in the layout of ADEChallengeData2016 (ADE20K): JPEG images and label maps."""

from pathlib import Path

from PIL import Image

from demo_data.scenes import Scene

_FOLDERS = {'train': 'training', 'val': 'validation'}


def write_ade(root: Path, scene: Scene, jpeg: bytes) -> None:
    """Write the image of a scene, given as an encoded JPEG, and its label map.

    The label is the index into `SEG_CLASSES` plus one; 0 would be unlabeled, and no pixel is.
    """
    stem = f'ADE_{scene.split}_{scene.index + 1:08d}'
    images = root / 'images' / _FOLDERS[scene.split]
    truth = root / 'annotations' / _FOLDERS[scene.split]
    for folder in (images, truth):
        folder.mkdir(parents=True, exist_ok=True)
    (images / f'{stem}.jpg').write_bytes(jpeg)
    Image.fromarray(scene.segmentation() + 1).save(truth / f'{stem}.png')
