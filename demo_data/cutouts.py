"""Real objects with their true masks, cut out of photographs.

How each mask is known:

* coin: watershed on the gradient between a disc inside the coin and the table around it;
* cup: cup, saucer and spoon handle, outlined by hand;
* horse: the silhouette itself, clothed in fur of a cat (the file has no inner texture);
* motorcycle: the stereo data set's measured disparity, minus that of the garage floor.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from skimage import draw, filters, measure, morphology, segmentation

from demo_data.classes import CLASSES
from demo_data.photographs import read_disparity, read_photograph

# Cut-outs are kept at most this large: three times the largest object of a default scene.
_MAX_SIDE = 216

# Centre (x, y) and radius of the coins in coins.png, row by row.
_COINS = (
    (44, 54, 20), (100, 56, 19), (155, 51, 23), (215, 51, 22.5), (276, 53, 20), (335, 43.5, 29),
    (45, 124, 20.5), (102.5, 125.5, 19), (154, 127, 19), (205.5, 124, 20), (270.5, 119, 25),
    (336, 124.5, 19.5), (44, 197, 19), (102, 195.5, 21.5), (154, 198, 19), (212.5, 193, 23.5),
    (275, 195, 22), (347, 187, 32), (46, 260, 28), (114, 265.5, 21.5), (172.5, 261.5, 27.5),
    (244, 263.5, 24), (300.5, 263, 25), (358, 268, 22),
)  # fmt: skip
# Every fourth coin is kept for validation: one or two of each row.
_VAL_COINS = frozenset(range(3, len(_COINS), 4))

# Outline of cup, spoon handle and saucer in coffee.png, clockwise from where the saucer goes
# under the rim of the cup.
_CUP_OUTLINE = (
    (181.9, 70.0), (194.2, 53.7), (213.3, 37.6), (236.3, 26.1), (259.3, 19.9), (286.1, 18.0),
    (313.0, 20.3), (336.0, 26.8), (359.0, 37.6), (378.1, 52.5), (395.4, 73.4), (399.2, 69.8),
    (408.8, 67.3), (419.5, 69.0), (424.0, 76.5), (422.2, 86.2), (417.4, 105.0), (437.5, 122.7),
    (451.0, 140.0), (462.5, 159.1), (472.0, 180.2), (477.8, 199.3), (480.1, 218.5), (477.8, 241.5),
    (472.0, 268.3), (460.5, 295.1), (443.3, 320.0), (424.1, 341.1), (397.3, 360.3), (366.6, 375.6),
    (336.0, 385.2), (305.3, 389.2), (267.0, 390.0), (244.0, 387.5), (213.3, 381.4), (182.7, 371.8),
    (155.8, 358.4), (132.8, 341.1), (113.7, 322.0), (98.3, 300.9), (86.8, 277.9), (79.9, 253.0),
    (76.5, 230.0), (77.3, 207.0), (82.2, 180.2), (90.7, 157.2), (102.2, 136.1), (117.5, 115.0),
    (136.7, 95.1), (155.8, 80.0),
)  # fmt: skip

# Windows of fur (left, top, right, bottom) in chelsea.png: left of the forehead for training,
# right of it for validation.
_TRAIN_COATS = ((70, 15, 155, 85), (98, 15, 183, 85), (126, 15, 211, 85))
_VAL_COATS = ((220, 15, 305, 85), (238, 15, 323, 85))

# The garage floor is a plane, so its disparity is affine in (x, y); fitted on the bare floor.
_FLOOR_PLANE = (-0.00220, 0.17411, -29.016)


@dataclass(frozen=True)
class Cutout:
    """An object on a transparent ground.

    Attributes:
        name: which object of which photograph.
        label: index into `CLASSES`.
        rgba: uint8, (H, W, 4), cropped to the object; alpha is its coverage of each pixel.
    """

    name: str
    label: int
    rgba: np.ndarray


def load_cutouts() -> dict[str, list[Cutout]]:
    """All cut-outs of the splits 'train' and 'val'.

    Held out from training are every fourth coin, the right photograph of the motorcycle and a part
    of the fur. Of the cup there is one photograph, so both splits have the same cut-out.
    """
    splits: dict[str, list[Cutout]] = {'train': [], 'val': []}
    coins = read_photograph('coins')
    for number, mask in enumerate(_coin_masks(coins)):
        split = 'val' if number in _VAL_COINS else 'train'
        splits[split].append(_cut(f'coin-{number + 1:02d}', 'coin', coins, _soften(mask)))

    coffee = read_photograph('coffee')
    cup = _cut('cup', 'cup', coffee, _soften(_cup_mask(coffee.shape[:2])))
    splits['train'].append(cup)
    splits['val'].append(cup)

    silhouette = 255 - read_photograph('horse')[..., 0]
    fur = read_photograph('chelsea')
    for split, coats in (('train', _TRAIN_COATS), ('val', _VAL_COATS)):
        for number, window in enumerate(coats, 1):
            coat = Image.fromarray(fur).crop(window)
            coat = np.asarray(coat.resize(silhouette.shape[::-1], Image.Resampling.BICUBIC))
            splits[split].append(_cut(f'horse-{split}-coat-{number}', 'horse', coat, silhouette))

    left, right = _motorcycle_masks(read_disparity())
    for split, view, mask in (('train', 'left', left), ('val', 'right', right)):
        photograph = read_photograph(f'motorcycle_{view}')
        name = f'motorcycle-{view}'
        splits[split].append(_cut(name, 'motorcycle', photograph, _soften(mask)))
    return splits


def _coin_masks(photograph: np.ndarray) -> list[np.ndarray]:
    grey = photograph[..., 0] / 255.0
    gradient = filters.sobel(filters.gaussian(grey, 0.7))
    rows, columns = np.indices(grey.shape)
    masks = []
    for x, y, radius in _COINS:
        distance = np.hypot(columns - x, rows - y)
        markers = np.where(distance < 0.83 * radius, 1, np.where(distance > 1.22 * radius, 2, 0))
        # The watershed decides the ring between the markers; this window has all of it.
        reach = math.ceil(1.4 * radius)
        window = np.s_[max(0, int(y) - reach) : int(y) + reach, int(x) - reach : int(x) + reach]
        coin = np.zeros(grey.shape, dtype=bool)
        coin[window] = segmentation.watershed(gradient[window], markers[window]) == 1
        # The opening takes away specks of the table that hang on the rim.
        masks.append(morphology.opening(coin, morphology.disk(4)))
    return masks


def _cup_mask(shape: tuple[int, int]) -> np.ndarray:
    return draw.polygon2mask(shape, np.array(_CUP_OUTLINE)[:, ::-1])


def _motorcycle_masks(disparity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the left and of the right photograph from the disparity of the left one."""
    measured = np.isfinite(disparity)
    rows, columns = np.indices(disparity.shape)
    a, b, c = _FLOOR_PLANE
    height_over_floor = disparity - (a * columns + b * rows + c)
    # Everything behind the motorcycle has a disparity below 36 or lies on the floor.
    left = _tidy(measured & (disparity > 36) & (height_over_floor > 0.7), measured, 1)

    # A point at column x of the left photograph is at column x - disparity of the right one.
    y, x = np.nonzero(left & measured)
    target = x - disparity[y, x]
    right = np.zeros_like(left)
    for column in (np.floor(target).astype(int), np.ceil(target).astype(int)):
        right[y, column] = True
    return left, _tidy(right, np.ones_like(measured), 2)


def _tidy(mask: np.ndarray, measured: np.ndarray, closing_radius: int) -> np.ndarray:
    """The largest component of the mask without pinholes, unmeasured spots and loose pixels."""
    mask = _largest(morphology.closing(mask, morphology.disk(closing_radius)))
    gaps = measure.label(~mask, connectivity=1)
    outside = gaps[0, 0]
    sizes = np.bincount(gaps.ravel())
    unmeasured = np.bincount(gaps.ravel(), weights=~measured.ravel())
    filled = (sizes < 60) | (unmeasured > 0.4 * sizes)
    filled[outside] = False
    return _largest(morphology.opening(mask | filled[gaps], morphology.disk(1)))


def _largest(mask: np.ndarray) -> np.ndarray:
    labels = measure.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def _soften(mask: np.ndarray) -> np.ndarray:
    """Alpha in 0 .. 255 that falls off inside the mask, so that no rim of background shows."""
    blurred = filters.gaussian(mask.astype(float), 0.7)
    return np.rint(255 * np.clip(2 * blurred - 0.8, 0, 1)).astype(np.uint8)


def _cut(name: str, class_name: str, photograph: np.ndarray, alpha: np.ndarray) -> Cutout:
    image = Image.fromarray(np.dstack([photograph, alpha]))
    image = image.crop(image.getchannel('A').getbbox())
    image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BICUBIC)
    return Cutout(name, CLASSES.index(class_name), np.asarray(image))
