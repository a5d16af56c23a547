"""Compose scenes: a background, two to five objects on it, and the mask of what is visible."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from skimage import measure, morphology

from demo_data.backgrounds import Background
from demo_data.classes import CLASSES
from demo_data.cutouts import Cutout

_OBJECTS_PER_SCENE = (2, 5)
# Longer side of an object as a share of the width of the scene: 24 to 72 of 160 pixels.
_OBJECT_SIDE = (24 / 160, 72 / 160)
# No object is covered by later ones until less than this share of its mask is left.
_MIN_VISIBLE = 0.3
# Largest rotation in degrees; coins lie on a table, the others have an upright.
_MAX_ROTATION = {'coin': 180.0, 'cup': 40.0, 'horse': 15.0, 'motorcycle': 15.0}
# Parts of an object below this share of its area are left out when it is shrunk.
_MIN_PART = 0.04
_PLACEMENT_TRIALS = 30


@dataclass(frozen=True)
class Instance:
    """One object of a scene.

    Attributes:
        label: index into `CLASSES`.
        cutout: name of the cut-out.
        mask: bool, (H, W): the pixels where the object is seen.
    """

    label: int
    cutout: str
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A composed picture with its truth.

    Attributes:
        split: 'train' or 'val'.
        index: number within the split, from 0.
        background: name of the photograph behind the objects.
        image: uint8, (H, W, 3), RGB.
        instances: the objects, the lowest first; their masks are disjoint.
    """

    split: str
    index: int
    background: str
    image: np.ndarray
    instances: tuple[Instance, ...]

    def segmentation(self) -> np.ndarray:
        """Labels of `SEG_CLASSES`, uint8, (H, W): 0 is background, 1 the first object class."""
        labels = np.zeros(self.image.shape[:2], dtype=np.uint8)
        for instance in self.instances:
            labels[instance.mask] = instance.label + 1
        return labels


def compose_scene(
    split: str,
    index: int,
    cutouts: list[Cutout],
    backgrounds: list[Background],
    *,
    width: int,
    height: int,
    seed: int,
) -> Scene:
    """Scene number `index` of a split; it depends on nothing but the arguments.

    A pixel belongs to the topmost object that covers at least half of it.
    """
    rng = np.random.default_rng([seed, ('train', 'val').index(split), index])
    background = backgrounds[rng.integers(len(backgrounds))]
    image = background.sample(rng, width, height)
    wanted = rng.integers(_OBJECTS_PER_SCENE[0], _OBJECTS_PER_SCENE[1] + 1)
    placed: list[tuple[Cutout, np.ndarray, int]] = []  # cut-out, visible mask, area when whole
    while len(placed) < wanted:
        label = rng.integers(len(CLASSES))
        candidates = [cutout for cutout in cutouts if cutout.label == label]
        cutout = candidates[rng.integers(len(candidates))]
        side = rng.uniform(*_OBJECT_SIDE) * width
        colour, alpha = pose(cutout, side, rng)
        for _ in range(_PLACEMENT_TRIALS):
            top = rng.integers(height - alpha.shape[0] + 1)
            left = rng.integers(width - alpha.shape[1] + 1)
            window = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
            mask = np.zeros((height, width), dtype=bool)
            mask[window] = alpha >= 0.5
            remaining = [visible & ~mask for _, visible, _ in placed]
            if all(
                seen.sum() >= _MIN_VISIBLE * area
                for seen, (_, _, area) in zip(remaining, placed, strict=True)
            ):
                image[window] += alpha[..., None] * (colour - image[window])
                placed = [
                    (other, seen, area)
                    for seen, (other, _, area) in zip(remaining, placed, strict=True)
                ]
                placed.append((cutout, mask, int(mask.sum())))
                break
    return Scene(
        split=split,
        index=index,
        background=background.name,
        image=np.rint(image.clip(0, 255)).astype(np.uint8),
        instances=tuple(Instance(cutout.label, cutout.name, mask) for cutout, mask, _ in placed),
    )


def pose(cutout: Cutout, side: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A cut-out turned, mirrored, scaled and relit.

    Args:
        cutout: the object.
        side: longer side of the result in pixels.
        rng: draws the rest.

    Returns:
        Colour, float (h, w, 3), and coverage from 0 to 1, float (h, w).
    """
    image = Image.fromarray(cutout.rgba)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    limit = _MAX_ROTATION[CLASSES[cutout.label]]
    image = image.rotate(rng.uniform(-limit, limit), Image.Resampling.BICUBIC, expand=True)
    image = image.crop(image.getchannel('A').getbbox())
    zoom = side / max(image.size)
    size = tuple(max(1, round(length * zoom)) for length in image.size)
    posed = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    light = rng.uniform(0.7, 1.25) * rng.uniform(0.93, 1.07, size=3)
    alpha = posed[..., 3] / 255
    return posed[..., :3] * light, np.where(_near_body(alpha >= 0.5), alpha, 0)


def _near_body(mask: np.ndarray) -> np.ndarray:
    """Pixels on or beside the parts that count: wires thinner than a pixel break into specks."""
    parts = measure.label(mask)
    sizes = np.bincount(parts.ravel())
    body = sizes >= _MIN_PART * mask.sum()
    body[0] = False
    return morphology.dilation(body[parts], np.ones((3, 3), dtype=np.uint8))
