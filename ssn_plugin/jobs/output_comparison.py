"""What two models make of the same images, compared."""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SCORE = 0.3
OVERLAP = 0.9


@dataclass
class Comparison:
    """Differences between two models over some images.

    Attributes:
        images: Number of images.
        largest: Largest difference of a number in an output tensor, as a part of the largest
            number of that tensor; NaN if an output is NaN or infinite.
        mean: Mean of these differences over all numbers.
        boxes: Boxes that the first model scores at least :data:`SCORE`; None if the models detect
            nothing.
        matched: How many of them the second finds too, of the same class and with an IoU of at
            least :data:`OVERLAP`.
        coordinate: Largest difference of a coordinate of matched boxes, in pixels.
        score: Largest difference of a score of matched boxes.
        classified: What the models classify besides, 'pixels' or 'images', if they do.
        labels: How many of those there are.
        equal_labels: How many of them both put into the same class.
    """

    images: int = 0
    largest: float = 0.0
    mean: float = 0.0
    boxes: int | None = None
    matched: int = 0
    coordinate: float = 0.0
    score: float = 0.0
    classified: str | None = None
    labels: int = 0
    equal_labels: int = 0

    def __str__(self) -> str:
        images = f'{self.images} image' + 's' * (self.images != 1)
        lines = [
            f'outputs on {images}: largest difference {self.largest:.1e}, '
            f'mean {self.mean:.1e}, relative to the largest output'
        ]
        if self.boxes == 0:
            lines.append(f'no box has a score of at least {SCORE}')
        elif self.boxes is not None:
            lines.append(
                f'{self.matched} of {self.boxes} boxes matched, largest difference of a coordinate '
                f'{self.coordinate:.1e} px, of a score {self.score:.1e}'
            )
        if self.classified is not None:
            lines.append(f'{self.equal_labels} of {self.labels} {self.classified} of equal class')
        return '\n'.join(lines)


@torch.no_grad()
def compare_outputs(first: nn.Module, second: nn.Module, batches: Iterable[dict]) -> Comparison:
    """Compare two detectors, segmentors or classifiers of OpenMMLab, in evaluation.

    The outputs are those of the networks before any decision is made: features of the neck, maps of
    dense heads, class logits. The heads of a two-stage detector get the same proposals, the first
    model's. What is decided from them (boxes, classes of pixels) is compared besides.

    Args:
        first: The model to compare with.
        second: The other.
        batches: Of :func:`ssn_plugin.jobs.sample_images.sample_batches`.
    """
    found = Comparison()
    total, count = 0.0, 0
    for batch in batches:
        proposals: list = []
        pairs = zip(
            *(list(_outputs(model, batch, proposals)) for model in (first, second)), strict=True
        )
        for ours, theirs in pairs:
            ours, theirs = ours.cpu(), theirs.cpu()  # MPS has no float64
            scale = float(ours.abs().max()) or 1.0
            differences = (theirs.double() - ours.double()).abs() / scale
            largest = float(differences.max())
            finite = math.isfinite(scale) and math.isfinite(largest)
            found.largest = max(found.largest, largest) if finite else math.nan
            total += float(differences.sum())
            count += differences.numel()
        samples = (model.test_step(copy.deepcopy(batch)) for model in (first, second))
        for ours, theirs in zip(*samples, strict=True):
            _compare_decisions(ours, theirs, found)
        found.images += 1
    found.mean = total / max(count, 1)
    return found


def _outputs(model: nn.Module, batch: dict, proposals: list) -> Iterator[Tensor]:
    """Tensors of a forward pass; of a two-stage detector, from and into ``proposals``."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    inputs, samples = data['inputs'], data['data_samples']
    if not (hasattr(model, 'rpn_head') and hasattr(model, 'roi_head')):
        return _tensors(model(inputs, samples, mode='tensor'))
    features = model.extract_feat(inputs)
    if not proposals:
        proposals += model.rpn_head.predict(features, samples, rescale=False)
    heads = model.roi_head.forward(features, copy.deepcopy(proposals), samples)
    return _tensors((features, model.rpn_head(features), heads))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _compare_decisions(ours: object, theirs: object, found: Comparison) -> None:
    """Add one image's boxes or classes, by the names that OpenMMLab's data samples share."""
    if 'pred_instances' in ours:
        _match_boxes(ours.pred_instances, theirs.pred_instances, found)
    for name, classified in (('pred_sem_seg', 'pixels'), ('pred_label', 'images')):
        if name in ours:
            labels, others = (
                getattr(getattr(sample, name), 'data', getattr(sample, name))
                for sample in (ours, theirs)
            )
            found.classified = classified
            found.labels += labels.numel()
            found.equal_labels += int((labels == others).sum())


def _match_boxes(ours: object, theirs: object, found: Comparison) -> None:
    found.boxes = found.boxes or 0
    free = torch.ones(len(theirs.scores), dtype=torch.bool)
    for box, score, label in zip(ours.bboxes, ours.scores, ours.labels, strict=True):
        if score < SCORE:
            continue
        found.boxes += 1
        overlaps = _overlaps(box, theirs.bboxes)
        overlaps[~(free & (theirs.labels == label))] = 0
        if not len(overlaps) or not overlaps.max() >= OVERLAP:  # boxes without area have none
            continue
        match = int(overlaps.argmax())
        free[match] = False
        found.matched += 1
        found.coordinate = max(found.coordinate, float((theirs.bboxes[match] - box).abs().max()))
        found.score = max(found.score, float((theirs.scores[match] - score).abs()))


def _overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one (4,) with (n, 4), corners as x1, y1, x2, y2."""
    low, high = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (area - shared)
