"""The photographs the demo data set is made of: files inside the scikit-image wheel."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Photograph:
    """A file of `skimage/data` with the origin and licence that scikit-image states for it."""

    file: str
    subject: str
    origin: str
    licence: str


PHOTOGRAPHS: dict[str, Photograph] = {
    photograph.file.split('.')[0]: photograph
    for photograph in (
        Photograph(
            'coins.png',
            '24 Greek coins from Pompeii',
            'Brooklyn Museum Collection',
            'no known copyright restrictions',
        ),
        Photograph('coffee.png', 'cup of coffee', 'Rachel Michetti, Pikolo Espresso Bar', 'CC0'),
        Photograph(
            'horse.png', 'silhouette of a horse', 'Andreas Preuss (marauder), openclipart', 'CC0'
        ),
        Photograph('chelsea.png', "cat; its fur is the horse's coat", 'Stefan van der Walt', 'CC0'),
        Photograph(
            'motorcycle_left.png',
            'motorcycle, left camera',
            'Middlebury stereo data set 2014 (Scharstein et al., GCPR 2014)',
            'not stated by scikit-image',
        ),
        Photograph(
            'motorcycle_right.png',
            'motorcycle, right camera',
            'Middlebury stereo data set 2014 (Scharstein et al., GCPR 2014)',
            'not stated by scikit-image',
        ),
        Photograph(
            'motorcycle_disp.npz',
            'measured disparity of the left view',
            'Middlebury stereo data set 2014 (Scharstein et al., GCPR 2014)',
            'not stated by scikit-image',
        ),
        Photograph('brick.png', 'brick wall', 'CC0Textures, Bricks25', 'CC0'),
        Photograph('grass.png', 'grass', 'linolafett, DeviantArt', 'CC0'),
        Photograph('gravel.png', 'gravel', 'CC0Textures, Gravel04', 'CC0'),
        Photograph('moon.png', 'surface of the moon', 'not stated', 'not stated by scikit-image'),
        Photograph(
            'ihc.png',
            'stained tissue',
            'Center for Microscopy And Molecular Imaging',
            'no known copyright restrictions',
        ),
        Photograph('retina.jpg', 'fundus of an eye', 'Wikimedia Commons', 'CC0'),
        Photograph('hubble_deep_field.jpg', 'galaxies', 'NASA, ESA (Hubble)', 'public domain'),
    )
}
"""Every photograph in use, by file name without its suffix."""


def photograph_path(name: str) -> Path:
    """Where a photograph lies inside the installed scikit-image.

    The file is taken from the package folder, never through `skimage.data`, which would download
    what it misses.

    Raises:
        ImportError: scikit-image is not installed.
        FileNotFoundError: this installation of scikit-image was stripped of the photograph.
    """
    spec = find_spec('skimage')
    if spec is None or spec.origin is None:
        raise ImportError(
            'scikit-image is not installed, and the demo data set is made of its photographs: '
            "pip install 'scikit-image>=0.25'"
        )
    path = Path(spec.origin).parent / 'data' / PHOTOGRAPHS[name].file
    if not path.is_file():
        raise FileNotFoundError(
            f'photograph {path} is missing: reinstall scikit-image from PyPI '
            "(pip install --force-reinstall --no-deps 'scikit-image>=0.25')"
        )
    return path


def read_photograph(name: str) -> np.ndarray:
    """A photograph as uint8 of shape (H, W, 3); grey ones have three equal channels."""
    with Image.open(photograph_path(name)) as image:
        return np.asarray(image.convert('RGB'))


def read_disparity() -> np.ndarray:
    """Disparity of the left motorcycle photograph in pixels, (H, W); inf where not measured."""
    with np.load(photograph_path('motorcycle_disp')) as archive:
        return archive['arr_0']
