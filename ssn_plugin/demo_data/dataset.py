"""Build the demo data set: compose all scenes, write them in three layouts, move into place."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from ssn_plugin.demo_data.readme import readme

# Written last; a folder that has it is a finished demo data set.
RECORD_FILE = 'demo_data.json'
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
    _check_integer('num_train', num_train, 1, 100_000)
    _check_integer('num_val', num_val, 1, 100_000)
    _check_integer('size', size, 96, 320)
    _check_integer('seed', seed, 0, 2**63 - 1)
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
    if _is_there(out, settings, overwrite):
        return False
    with _folder_moved_into_place(out) as folder:
        _write_scenes(folder, settings, progress)
        versions = {name: version(name) for name in ('numpy', 'pillow', 'scikit-image')}
        (folder / 'README.md').write_text(readme(settings, versions))
        record = {'settings': settings, 'versions': versions}
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + '\n')
    return True


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f'{name} must be an integer from {low} to {high}, got {value!r}')


def _is_there(out: Path, settings: dict[str, int], overwrite: bool) -> bool:
    """Whether `out` is this data set already; raises if it must not be written to."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise FileExistsError(f'{out} is a file; give the name of a folder')
    if not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / RECORD_FILE).read_text())['settings']
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(
            f'{out} is not empty and holds no demo data set; give another folder'
        ) from None
    if found == settings:
        return True
    if not overwrite:
        raise FileExistsError(
            f'{out} holds a demo data set with other settings {found}; '
            'replace it with overwrite (--overwrite), or give another folder'
        )
    return False


@contextmanager
def _folder_moved_into_place(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place on success and vanishes on failure."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    except OSError as error:
        raise OSError(f'cannot write to {out.parent}: {error.strerror}') from error
    try:
        folder = workspace / 'new'
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(workspace / 'old')
        folder.rename(out)
    except BaseException:
        if (workspace / 'old').exists() and not out.exists():
            (workspace / 'old').rename(out)
        raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _write_scenes(
    folder: Path, settings: dict[str, int], progress: Callable[[int, int], None] | None
) -> None:
    # Imported here: these need scikit-image, and the class names must be readable without it.
    try:
        from ssn_plugin.demo_data.ade_layout import write_ade
        from ssn_plugin.demo_data.backgrounds import load_backgrounds
        from ssn_plugin.demo_data.cityscapes_layout import write_cityscapes
        from ssn_plugin.demo_data.coco_layout import CocoSplit
        from ssn_plugin.demo_data.cutouts import load_cutouts
        from ssn_plugin.demo_data.scenes import compose_scene
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
