"""Differences of outputs, and boxes that two detectors share."""

import math

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.output_comparison import Comparison, _match_boxes, compare_outputs


class Scaled(BaseModel):
    """Outputs that are known; it detects and classifies what it is told to."""

    def __init__(self, *outputs: torch.Tensor, **decided) -> None:
        super().__init__()
        self.outputs, self.decided = outputs, decided

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'predict':
            sample = BaseDataElement()
            for name, value in self.decided.items():
                sample.set_data({name: value})
            return [sample]
        return {'a': [self.outputs[0]], 'b': (self.outputs[1:], None, torch.tensor([1]))}


def compare(first: Scaled, second: Scaled, batches: int = 1) -> Comparison:
    return compare_outputs(
        first, second, [dict(inputs=torch.zeros(1), data_samples=None)] * batches
    )


def test_each_tensor_is_relative_to_its_largest_number():
    first = Scaled(torch.tensor([1.0, -4.0]), torch.tensor([100.0, 1.0]), torch.zeros(2))
    second = Scaled(torch.tensor([1.0, -4.4]), torch.tensor([101.0, 1.0]), torch.zeros(2))
    found = compare(first, second, batches=2)
    assert found.images == 2
    assert found.largest == pytest.approx(0.1)
    assert found.mean == pytest.approx((0.1 + 0.01) / 6)
    assert (found.boxes, found.classified) == (None, None)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_what_is_not_finite_is_no_small_difference(bad):
    fine, broken = Scaled(torch.ones(2)), Scaled(torch.tensor([1.0, bad]))
    for pair in ((fine, broken), (broken, fine), (broken, broken)):
        assert math.isnan(compare(*pair).largest)
    assert math.isnan(compare(broken, broken, batches=2).largest)


def test_classes_of_pixels():
    maps = [BaseDataElement(data=torch.tensor([[[0, 1], [2, wrong]]])) for wrong in (3, 4)]
    first, second = (Scaled(torch.ones(1), pred_sem_seg=each) for each in maps)
    found = compare(first, second)
    assert (found.labels, found.equal_labels) == (4, 3)
    assert '3 of 4 pixels of equal class' in str(found)


def instances(*rows: tuple) -> InstanceData:
    """Of (x1, y1, x2, y2, score, class)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return InstanceData(bboxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long())


def matched(ours: InstanceData, theirs: InstanceData) -> Comparison:
    found = Comparison()
    _match_boxes(ours, theirs, found)
    return found


def test_boxes_are_matched():
    ours = instances((0, 0, 10, 10, 0.9, 1), (0, 0, 10, 10, 0.8, 2), (5, 5, 20, 20, 0.1, 1))
    theirs = instances((0, 0, 10, 10, 0.7, 2), (0, 0.25, 10, 10, 0.875, 1))
    found = matched(ours, theirs)
    assert (found.boxes, found.matched) == (2, 2)  # the third has a low score
    assert found.coordinate == 0.25
    assert found.score == pytest.approx(0.1)


@pytest.mark.parametrize(
    'others',
    [
        dict(keypoints=torch.zeros(2, 17, 2), bboxes=torch.zeros(2, 4).numpy()),  # mmpose
        dict(bboxes=torch.zeros(2, 5), scores=torch.ones(2), labels=torch.ones(2)),  # mmrotate
    ],
    ids=['keypoints', 'rotated'],
)
def test_instances_that_are_no_upright_boxes_are_left_alone(others):
    first, second = (Scaled(torch.ones(1), pred_instances=InstanceData(**others)) for _ in range(2))
    found = compare(first, second)
    assert (found.images, found.boxes, found.largest) == (1, None, 0)


def test_boxes_that_have_no_match():
    box = (0, 0, 10, 10, 0.9, 1)
    for others in ([], [(0, 0, 10, 10, 0.9, 2)], [(0, 0, 10, 8, 0.9, 1)]):
        found = matched(instances(box), instances(*others))
        assert (found.boxes, found.matched) == (1, 0)
    found = matched(instances(box, box), instances(box))  # one for each
    assert (found.boxes, found.matched) == (2, 1)
    assert matched(instances(), instances(box)).boxes == 0
    point = (3, 3, 3, 3, 0.9, 1)  # of no area, so it overlaps nothing
    assert matched(instances(point), instances(point)).matched == 0


# ---------------------------------------------------------------- of networks that are not so plain


class Head(nn.Module):
    """A head that can do nothing but predict, from proposals."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.scores = nn.Identity()
        self.shift = shift

    def predict(self, x):
        return self.scores(x + self.shift)


class Proposals(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def predict(self, x):
        return x.new_ones(self.count)


class Detector(BaseModel):
    """Without outputs of its own: it draws, proposes what it likes, and looks at its proposals."""

    def __init__(self, weight: float = 1.0, shift: float = 0.0, proposed: int = 2) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(1, 1, 1, bias=False)
        self.neck = nn.Sequential(nn.Identity())
        self.bbox_head = Head(shift)
        self.rpn_head = Proposals(proposed)
        nn.init.constant_(self.backbone.weight, weight)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'tensor':
            raise NotImplementedError('it only predicts')
        x = self.neck(self.backbone(inputs)) + torch.rand(1)
        x = x + self.rpn_head.predict(x).sum()
        return [BaseDataElement(pred_label=BaseDataElement(data=self.bbox_head.predict(x) > 1))]


def compare_detectors(first: Detector, second: Detector) -> Comparison:
    image = torch.linspace(1, 2, 4).reshape(1, 1, 2, 2)
    return compare_outputs(first.eval(), second.eval(), [dict(inputs=image, data_samples=None)])


def test_parts_are_compared_where_the_network_does_nothing_but_predict():
    """With the same random numbers and the same proposals; bare convolutions are left out."""
    pair = Detector(), Detector(proposed=7)
    before = torch.get_rng_state()
    same = compare_detectors(*pair)
    assert torch.equal(torch.get_rng_state(), before)
    assert (same.largest, same.left_out, same.labels) == (0, set(), 4)
    other = compare_detectors(Detector(), Detector(shift=-0.5))
    assert 0 < other.largest < 0.5
    neck = compare_detectors(Detector(), Detector(weight=1.5))
    assert neck.largest == pytest.approx(0.5)
    detector = Detector()
    compare_detectors(detector, detector)
    assert not any(module._forward_hooks for module in detector.modules())
    assert 'predict' not in vars(detector.rpn_head)


def test_what_is_drawn_is_the_same_whatever_was_drawn_before():
    """Seeded before each pass, on GPUs too, whose generators nobody puts back."""
    drawn = []

    class Noting(Detector):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            if mode == 'predict':
                drawn.append((torch.initial_seed(), torch.rand(1).item()))
            return super().forward(inputs, data_samples, mode)

    for seed in (1, 2):
        torch.manual_seed(seed)
        compare_detectors(Noting(), Noting())
    assert len(drawn) >= 4
    assert len(set(drawn)) == 1


def test_parts_that_cannot_be_paired_are_named():
    class Other(Detector):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            found = super().forward(inputs, data_samples, mode)
            self.neck(inputs)
            return found

    found = compare_detectors(Detector(), Other())
    assert found.left_out == {'neck'}
    assert 'not compared' in str(found)


def test_a_network_that_does_not_run_is_one_line():
    class Broken(Detector):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            raise RuntimeError('two\nlines')

    with pytest.raises(InputError, match='does not run on the images: RuntimeError: two') as caught:
        compare_detectors(Broken(), Broken())
    assert '\n' not in str(caught.value)


def test_masks_are_matched_where_boxes_have_no_area():
    """As SOLO's, which are all zeros."""
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4], masks[1, 4:], masks[2, :, 2:] = True, True, True
    ours = instances((0, 0, 0, 0, 0.9, 1), (0, 0, 0, 0, 0.8, 1), (0, 0, 0, 0, 0.7, 1))
    theirs = ours.clone()
    ours.masks, theirs.masks = masks, masks.flip(0)
    assert matched(ours, ours).matched == 3
    assert matched(ours, theirs).matched == 3
    theirs.masks = torch.zeros_like(masks)
    assert matched(ours, theirs).matched == 0


def test_panoptic_pixels():
    maps = [BaseDataElement(sem_seg=torch.tensor([[[0, 1], [2, wrong]]])) for wrong in (3, 4)]
    found = compare(*(Scaled(torch.ones(1), pred_panoptic_seg=each) for each in maps))
    assert (found.labels, found.equal_labels) == (4, 3)
