"""Build the demo data set: compose all scenes, write them in three layouts, move into place."""

import io
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from demo_data.output_folder import (
    check_integer,
    folder_moved_into_place,
    is_there,
    library_versions,
    write_record,
)
from demo_data.readme import readme

# Raised whenever the same settings give other files.
_GENERATOR = 1
_JPEG_OPTIONS = {'quality': 92, 'subsampling': 0}


def make_demo_dataset(
    out: str | os.PathLike[str],
    *,
    num_train: int = 400,
    num_val: int = 80,
    size: int = 160,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Write the demo data set into the folder `out`, in the layouts of COCO, Cityscapes and ADE20K.

    The same arguments give the same bytes on the same versions of NumPy, Pillow and scikit-image.
    The folder appears when it is complete: an interruption leaves nothing at `out`.

    Args:
        out: folder to make; it may exist if it is empty.
        num_train: scenes for training.
        num_val: scenes for validation.
        size: width of a scene in pixels, a multiple of 32 from 96 to 320; the height is the
            multiple of 32 that is nearest to four fifths of it.
        seed: seed of the composition; which objects and regions are held out is not drawn.
        overwrite: replace a demo data set of other settings; any other folder is never replaced.
        progress: called as `progress(done, total)` after every scene.

    Returns:
        False if `out` already held the data set of exactly these settings, otherwise True.

    Raises:
        ValueError: a number is out of its range.
        FileExistsError: `out` is in use for something else.
        ImportError: scikit-image is missing.
        OSError: a photograph is missing or `out` cannot be written.

    Example:
        >>> make_demo_dataset("data/demo", num_train=40, num_val=8)  # doctest: +SKIP
        True
    """
    check_integer('num_train', num_train, 1, 100_000)
    check_integer('num_val', num_val, 1, 100_000)
    check_integer('size', size, 96, 320)
    check_integer('seed', seed, 0, 2**63 - 1)
    if size % 32:
        raise ValueError(f'size must be a multiple of 32, got {size}')
    out = Path(out).expanduser().resolve()
    settings = {
        'num_train': num_train,
        'num_val': num_val,
        'size': size,
        'seed': seed,
        'generator': _GENERATOR,
    }
    if is_there(out, settings, overwrite):
        return False
    with folder_moved_into_place(out) as folder:
        _write_scenes(folder, settings, progress)
        (folder / 'README.md').write_text(readme(settings, library_versions()))
        write_record(folder, settings)
    return True


def _write_scenes(
    folder: Path, settings: dict[str, int], progress: Callable[[int, int], None] | None
) -> None:
    # Imported here: these need scikit-image, and the class names must be readable without it.
    try:
        from demo_data.ade_layout import write_ade
        from demo_data.backgrounds import load_backgrounds
        from demo_data.cityscapes_layout import write_cityscapes
        from demo_data.coco_layout import CocoSplit
        from demo_data.cutouts import load_cutouts
        from demo_data.scenes import compose_scene
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{error.name} is missing, which the demo data set needs: '
            "pip install 'scikit-image>=0.25'"
        ) from error

    cutouts, backgrounds = load_cutouts(), load_backgrounds()
    numbers = {'train': settings['num_train'], 'val': settings['num_val']}
    total, done, first_id = sum(numbers.values()), 0, 1
    for split, number in numbers.items():
        coco = CocoSplit(folder / 'coco', split, first_id)
        for index in range(number):
            scene = compose_scene(
                split,
                index,
                cutouts[split],
                backgrounds[split],
                width=settings['size'],
                height=round(0.8 * settings['size'] / 32) * 32,
                seed=settings['seed'],
            )
            jpeg = io.BytesIO()
            Image.fromarray(scene.image).save(jpeg, 'JPEG', **_JPEG_OPTIONS)
            coco.add(scene, jpeg.getvalue())
            write_ade(folder / 'ade', scene, jpeg.getvalue())
            write_cityscapes(folder / 'cityscapes', scene)
            done += 1
            if progress is not None:
                progress(done, total)
        coco.close()
        first_id += number
