"""Backgrounds: windows of photographed textures, from regions that the splits do not share."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from demo_data.photographs import read_photograph

# Name of the photograph, its usable box (left, top, right, bottom), and how many of its pixels
# make one pixel of a scene of 160 pixels width.
_TEXTURES = (
    ('brick', (0, 0, 512, 512), 1.0),
    ('grass', (0, 0, 512, 512), 1.0),
    ('gravel', (0, 0, 512, 512), 1.0),
    ('moon', (0, 0, 512, 512), 1.0),
    ('ihc', (0, 0, 512, 512), 1.0),
    # Inside the round of the eye and of the frame of stars.
    ('retina', (230, 230, 1180, 1180), 2.0),
    ('hubble_deep_field', (0, 0, 1000, 872), 2.0),
)
# Share of the width for training; then a gap that belongs to no split; the rest for validation.
_TRAIN_SHARE, _GAP_SHARE = 0.58, 0.03


@dataclass(frozen=True)
class Background:
    """The region of one photograph that a split may use.

    Attributes:
        name: name of the photograph.
        region: (left, top, right, bottom) in the photograph.
        pixels: uint8, (height of the region, width of the region, 3).
        scale: pixels of the photograph per pixel of a scene of 160 pixels width.
    """

    name: str
    region: tuple[int, int, int, int]
    pixels: np.ndarray
    scale: float

    def sample(self, rng: np.random.Generator, width: int, height: int) -> np.ndarray:
        """A random window, zoomed, mirrored and recoloured, as float32 (height, width, 3)."""
        region_height, region_width = self.pixels.shape[:2]
        window_width = 160 * self.scale * rng.uniform(0.7, 1.15)
        window_width = min(window_width, region_width, region_height * width / height)
        window_height = window_width * height / width
        left = rng.uniform(0, region_width - window_width)
        top = rng.uniform(0, region_height - window_height)
        box = (left, top, left + window_width, top + window_height)
        window = Image.fromarray(self.pixels).resize(
            (width, height), Image.Resampling.BICUBIC, box=box
        )
        texture = np.asarray(window, dtype=np.float32)
        if rng.random() < 0.5:
            texture = texture[:, ::-1]
        if rng.random() < 0.5:
            texture = texture[::-1]
        return texture * (rng.uniform(0.6, 1.1) * rng.uniform(0.9, 1.1, size=3))


def load_backgrounds() -> dict[str, list[Background]]:
    """The backgrounds of the splits 'train' and 'val': left and right parts of each photograph."""
    splits: dict[str, list[Background]] = {'train': [], 'val': []}
    for name, (left, top, right, bottom), scale in _TEXTURES:
        photograph = read_photograph(name)
        train_end = left + round(_TRAIN_SHARE * (right - left))
        val_start = left + round((_TRAIN_SHARE + _GAP_SHARE) * (right - left))
        for split, start, end in (('train', left, train_end), ('val', val_start, right)):
            pixels = photograph[top:bottom, start:end]
            splits[split].append(Background(name, (start, top, end, bottom), pixels, scale))
    return splits
