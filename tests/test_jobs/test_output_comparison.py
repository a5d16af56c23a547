"""Differences of outputs, and boxes that two detectors share."""

import math

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement, InstanceData

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
