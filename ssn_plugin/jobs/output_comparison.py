"""What two models make of the same images, compared."""

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ssn_plugin.engine.randomness import preserved_generators, seed_iteration
from ssn_plugin.errors import InputError, in_one_line

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
        left_out: Parts of the network whose outputs could not be paired.
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
    left_out: set[str] = field(default_factory=set)

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
        if self.left_out:
            names = ', '.join(sorted(self.left_out))
            lines.append(f'not compared, for the models decided differently before: {names}')
        return '\n'.join(lines)


@torch.no_grad()
def compare_outputs(first: nn.Module, second: nn.Module, batches: Iterable[dict]) -> Comparison:
    """Compare two detectors, segmentors or classifiers of OpenMMLab, in evaluation.

    The outputs are those of the networks before any decision is made: features of the neck, maps of
    dense heads, class logits. Where a detector does not give them alone, they are those of its
    parts while it predicts. Heads that follow a decision get the first model's proposals. What is
    decided (boxes, classes of pixels) is compared besides. Networks that draw draw the same.

    Raises:
        InputError: If a model does not run on the images, or gives nothing to compare.
    """
    found = Comparison()
    total, count = 0.0, 0
    for batch in batches:
        decisions: dict = {}
        models = {'trained': first, 'new': second}
        outputs = [_outputs(model, batch, decisions, name) for name, model in models.items()]
        for name in outputs[0].keys() | outputs[1].keys():
            ours, theirs = (list(_tensors(each.get(name))) for each in outputs)
            if [each.shape for each in ours] != [each.shape for each in theirs]:
                found.left_out.add(name[0])
                continue
            for pair in zip(ours, theirs, strict=True):
                differences, largest = _relative_differences(*pair)
                found.largest = max(found.largest, largest) if math.isfinite(largest) else math.nan
                total += float(differences.sum())
                count += differences.numel()
        samples = (_run(model.test_step, batch, name) for name, model in models.items())
        for ours, theirs in zip(*samples, strict=True):
            _compare_decisions(ours, theirs, found)
        found.images += 1
    if not count:
        raise InputError(f'{type(first).__name__}: its networks give nothing that can be compared')
    found.mean = total / count
    return found


def _relative_differences(ours: Tensor, theirs: Tensor) -> tuple[Tensor, float]:
    ours, theirs = ours.cpu(), theirs.cpu()  # MPS has no float64
    scale = float(ours.abs().max()) or 1.0
    differences = (theirs.double() - ours.double()).abs() / scale
    return differences, float(differences.max()) if math.isfinite(scale) else math.nan


def _run(step: Callable, batch: dict, name: str) -> object:
    """One pass that draws the same numbers as every other."""
    with preserved_generators():
        seed_iteration(0, 0)
        try:
            return step(copy.deepcopy(batch))
        except Exception as error:  # of the model's own code
            raise InputError(
                f'the {name} model does not run on the images: {in_one_line(error)}'
            ) from error


def _outputs(
    model: nn.Module, batch: dict, decisions: dict, name: str
) -> dict[tuple[str, int], object]:
    """Outputs of the network, or of its parts, each with the number of the call."""
    with contextlib.suppress(InputError):  # heads that need more than features, or raise
        outputs = _run(lambda batch: _network_outputs(model, batch, decisions), batch, name)
        return {('', 0): outputs}
    outputs: dict = {}
    with _recorded_calls(model, outputs), _shared_decisions(model, decisions):
        _run(model.test_step, batch, name)
    return outputs


def _network_outputs(model: nn.Module, batch: dict, decisions: dict) -> object:
    """What the network gives without predicting; of a two-stage detector, for shared proposals."""
    data = model.data_preprocessor(batch, False)
    inputs, samples = data['inputs'], data['data_samples']
    if not (hasattr(model, 'rpn_head') and hasattr(model, 'roi_head')):
        return model(inputs, samples, mode='tensor')
    features = model.extract_feat(inputs)
    if 'proposals' not in decisions:
        decisions['proposals'] = model.rpn_head.predict(features, samples, rescale=False)
    proposals = copy.deepcopy(decisions['proposals'])
    heads = model.roi_head.forward(features, proposals, samples)
    return features, model.rpn_head(features), heads


@contextlib.contextmanager
def _recorded_calls(model: nn.Module, outputs: dict) -> Iterator[None]:
    """What the outermost parts that are called put out: backbone, neck, heads or layers of these.

    A convolution alone is none of them: what follows it may have been folded into it.
    """
    inside: list = []
    calls: Counter = Counter()

    def enter(module: nn.Module, _: object) -> None:
        inside.append(module)

    def leave(module: nn.Module, _: object, output: object, name: str) -> None:
        inside.pop()
        if not inside and not isinstance(module, _ConvNd):
            outputs[name, calls[name]] = output
            calls[name] += 1

    handles = []
    for name, module in model.named_modules():
        if module is not model and module is not model.data_preprocessor:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(partial(leave, name=name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _shared_decisions(model: nn.Module, decisions: dict) -> Iterator[None]:
    """Give the heads that follow a decision what the first model decided."""
    replaced = []
    for head, method in (('rpn_head', 'predict'), ('roi_head', 'predict_bbox')):
        owner = getattr(model, head, None)
        if hasattr(owner, method):
            decide = partial(_decided_first, getattr(owner, method), decisions, method)
            setattr(owner, method, decide)
            replaced.append((owner, method))
    try:
        yield
    finally:
        for owner, method in replaced:
            delattr(owner, method)


def _decided_first(method: Callable, decisions: dict, key: str, *args, **kwargs) -> object:
    own = method(*args, **kwargs)
    return copy.deepcopy(decisions.setdefault(key, own))


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
    if _are_boxes(ours.get('pred_instances')):
        _match_boxes(ours.pred_instances, theirs.pred_instances, found)
    for name, part, classified in (
        ('pred_sem_seg', 'data', 'pixels'),
        ('pred_panoptic_seg', 'sem_seg', 'pixels'),
        ('pred_label', 'data', 'images'),
    ):
        if name in ours:
            labels, others = (
                getattr(getattr(sample, name), part, getattr(sample, name))
                for sample in (ours, theirs)
            )
            found.classified = classified
            found.labels += labels.numel()
            found.equal_labels += int((labels == others).sum())


def _are_boxes(instances: object) -> bool:
    """Whether they are what mmdet detects; mmpose has keypoints, and mmrotate boxes of an angle."""
    if instances is None or not all(key in instances for key in ('bboxes', 'scores', 'labels')):
        return False
    return isinstance(instances.bboxes, Tensor) and instances.bboxes.shape[-1] == 4


def _match_boxes(ours: object, theirs: object, found: Comparison) -> None:
    found.boxes = found.boxes or 0
    free = torch.ones(len(theirs.scores), dtype=torch.bool)
    for index in range(len(ours.scores)):
        box, score, label = (ours[key][index] for key in ('bboxes', 'scores', 'labels'))
        if score < SCORE:
            continue
        found.boxes += 1
        overlaps = _overlaps(box, theirs.bboxes)
        if 'masks' in ours and not _areas(box):  # some detectors give masks alone
            overlaps = _mask_overlaps(ours.masks[index], theirs.masks)
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
    return shared / (_areas(box) + _areas(boxes) - shared)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def _mask_overlaps(mask: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of one (h, w) with (n, h, w), both boolean."""
    shared, either = ((each.flatten(1).sum(1)) for each in (mask & masks, mask | masks))
    return shared / either
