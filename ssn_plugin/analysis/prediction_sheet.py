"""A sheet of pictures with what a model predicted on them. Importing this imports matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle


class Prediction(NamedTuple):
    """What was predicted on one picture.

    Attributes:
        image: RGB, uint8, (H, W, 3).
        masks: One boolean (H, W) per object or class.
        labels: Class index of each mask.
        boxes: (x1, y1, x2, y2) of each object, or None for semantic segmentation.
        scores: Confidence of each object, or None.
    """

    image: np.ndarray
    masks: Sequence[np.ndarray]
    labels: Sequence[int]
    boxes: np.ndarray | None = None
    scores: Sequence[float] | None = None


def plot_predictions(
    predictions: Sequence[Prediction],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    path: Path,
    title: str,
    columns: int = 4,
) -> None:
    """Draw the pictures in a grid: masks as tinted areas, objects with box and score.

    ``classes`` are names and ``palette`` RGB colours, 0 to 255, by class index.

    Raises:
        ValueError: If there are no predictions.
    """
    if not predictions:
        raise ValueError('predictions: got none, expected at least one picture')
    rows = -(-len(predictions) // columns)
    height, width = predictions[0].image.shape[:2]
    figure = Figure(
        figsize=(3.4 * columns, 3.4 * height / width * rows + 0.9), layout='constrained'
    )
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for ax in axes:
        ax.axis('off')
    seen = set()
    for ax, prediction in zip(axes, predictions, strict=False):
        ax.imshow(prediction.image)
        for index, (mask, label) in enumerate(
            zip(prediction.masks, prediction.labels, strict=True)
        ):
            colour = np.asarray(palette[label]) / 255
            seen.add(label)
            tint = np.zeros((*mask.shape, 4))
            tint[mask] = (*colour, 0.45)
            ax.imshow(tint)
            if mask.any() and not mask.all():
                ax.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)
            if prediction.boxes is not None and prediction.scores is not None:
                x1, y1, x2, y2 = prediction.boxes[index]
                ax.add_patch(
                    Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, lw=1.2)
                )
                ax.text(
                    x1,
                    y1,
                    f'{classes[label]} {prediction.scores[index]:.2f}',
                    fontsize=7,
                    color='white',
                    va='bottom',
                    bbox=dict(facecolor=colour * 0.6, edgecolor='none', pad=0.8),
                )
    handles = [Patch(color=np.asarray(palette[i]) / 255, label=classes[i]) for i in sorted(seen)]
    if handles:
        figure.legend(handles=handles, loc='outside lower center', ncols=len(handles))
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
