"""DropoutLinearClsHead: dropout before the layer, in training alone; otherwise LinearClsHead."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

pytest.importorskip('mmpretrain')


def build(kind='DropoutLinearClsHead', **kwargs):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(dict(type=kind, num_classes=3, in_channels=1000, **kwargs))


def test_state_dict_is_that_of_the_linear_head():
    ours, theirs = build(), build('LinearClsHead')
    assert isinstance(ours, type(theirs))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict())


def test_without_training_it_is_the_linear_head():
    ours, theirs = build().eval(), build('LinearClsHead').eval()
    features = (torch.randn(4, 1), torch.randn(4, 1000))
    assert torch.equal(ours(features), theirs(features))


@pytest.mark.parametrize('dropout', [0.5, 0.2])
def test_training_drops_features_before_the_layer(dropout):
    head = build(dropout=dropout).train()
    # With weights of one, the scores count what is left: each feature is 0 or 1 / (1 - p).
    torch.nn.init.ones_(head.fc.weight)
    torch.nn.init.zeros_(head.fc.bias)
    scores = head((torch.ones(50, 1000),))
    assert torch.equal(scores[:, 0], scores[:, 1])  # one draw for all classes
    kept = scores[:, 0] * (1 - dropout)
    assert torch.allclose(kept, kept.round(), atol=1e-2)  # whole features
    assert kept.unique().numel() > 10  # another draw for every image
    spread = (1000 * dropout * (1 - dropout)) ** 0.5
    assert abs(kept.mean() - 1000 * (1 - dropout)) < 5 * spread / 50**0.5


def test_default_is_the_recipes_half():
    assert build().dropout.p == 0.5


def test_loss_goes_through_the_dropout():
    from mmpretrain.structures import DataSample

    head = build().train()
    samples = [DataSample().set_gt_label(i % 3) for i in range(4)]
    features = (torch.randn(4, 1000),)
    losses = {head.loss(features, samples)['loss'].item() for _ in range(3)}
    assert len(losses) == 3
    head.eval()
    predicted = head.predict(features, samples)
    expected = head.fc(features[-1]).softmax(1)
    torch.testing.assert_close(torch.stack([p.pred_score for p in predicted]), expected)


@pytest.mark.parametrize('dropout', [-0.1, 1.0, True, '0.5', float('nan')])
def test_bad_dropout_is_named(dropout):
    with pytest.raises(ValueError, match=r'dropout: got .*, expected a number in \[0, 1\)'):
        build(dropout=dropout)
