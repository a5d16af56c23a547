"""A folder of class folders for classifiers, made of the demo data set's objects and textures."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from demo_data.classes import CLASSES
from demo_data.output_folder import (
    check_integer,
    folder_moved_into_place,
    is_there,
    write_record,
)

# Longer side of an object as a share of the picture's.
_OBJECT_SIDE = (0.55, 0.9)


def make_image_folder(
    out: str | os.PathLike[str],
    *,
    num_train: int = 100,
    num_val: int = 25,
    size: int = 64,
    seed: int = 0,
    overwrite: bool = False,
) -> bool:
    """Write ``out/train/CLASS/*.jpg`` and ``out/val/CLASS/*.jpg``.

    The classes are the four objects of the demo scenes, each alone on a texture, and the textures
    themselves without an object. What is held out for validation is what the scenes hold out: other
    coins, the other photograph of the motorcycle, other fur, other regions of the textures; of the
    cup there is one photograph. The same arguments give the same bytes on the same versions of
    NumPy, Pillow and scikit-image, and an interruption leaves nothing at ``out``.

    Args:
        out: folder to make; it may exist if it is empty.
        num_train: training pictures per class.
        num_val: validation pictures per class.
        size: width and height in pixels.
        seed: seed of the composition.
        overwrite: replace a demo data set of other settings; any other folder is never replaced.

    Returns:
        False if ``out`` already held the folder of exactly these settings, otherwise True.

    Raises:
        ValueError: a number is out of its range.
        FileExistsError: ``out`` is in use for something else.
        ImportError: scikit-image is missing.
        OSError: a photograph is missing or ``out`` cannot be written.

    Example:
        >>> make_image_folder("data/imagefolder", num_train=40)  # doctest: +SKIP
        True
    """
    check_integer('num_train', num_train, 1, 100_000)
    check_integer('num_val', num_val, 1, 100_000)
    check_integer('size', size, 32, 320)
    check_integer('seed', seed, 0, 2**63 - 1)
    out = Path(out).expanduser().resolve()
    settings = {
        'layout': 'image folder',
        'num_train': num_train,
        'num_val': num_val,
        'size': size,
        'seed': seed,
    }
    if is_there(out, settings, overwrite):
        return False
    with folder_moved_into_place(out) as folder:
        _write_classes(folder, {'train': num_train, 'val': num_val}, size, seed)
        write_record(folder, settings)
    return True


def _write_classes(folder: Path, numbers: dict[str, int], size: int, seed: int) -> None:
    # Imported here: these need scikit-image, and a bad argument must be told without it.
    try:
        from demo_data.backgrounds import load_backgrounds
        from demo_data.cutouts import load_cutouts
        from demo_data.scenes import pose
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is missing, which the demo data need: pip install 'scikit-image>=0.25'"
        ) from error
    cutouts, backgrounds = load_cutouts(), load_backgrounds()
    names = (*CLASSES, *(background.name for background in backgrounds['train']))
    for split_number, (split, number) in enumerate(numbers.items()):
        for label, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            objects = [cutout for cutout in cutouts[split] if cutout.label == label]
            textures = [b for b in backgrounds[split] if b.name == name] or backgrounds[split]
            for index in range(number):
                rng = np.random.default_rng([seed, split_number, label, index])
                image = textures[rng.integers(len(textures))].sample(rng, size, size)
                if objects:
                    cutout = objects[rng.integers(len(objects))]
                    colour, alpha = pose(cutout, rng.uniform(*_OBJECT_SIDE) * size, rng)
                    top = rng.integers(size - alpha.shape[0] + 1)
                    left = rng.integers(size - alpha.shape[1] + 1)
                    window = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
                    image[window] += alpha[..., None] * (colour - image[window])
                jpeg = io.BytesIO()
                pixels = np.rint(image.clip(0, 255)).astype(np.uint8)
                Image.fromarray(pixels).save(jpeg, 'JPEG', quality=92, subsampling=0)
                (folder / split / name / f'{index:04d}.jpg').write_bytes(jpeg.getvalue())
