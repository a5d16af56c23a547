"""A linear classifier behind dropout. Importing this module imports mmpretrain."""

from mmpretrain.models.heads import LinearClsHead
from torch import Tensor, nn


class DropoutLinearClsHead(LinearClsHead):
    """mmpretrain's LinearClsHead with dropout before its only layer.

    ``scores = fc(dropout(features))``, ``features`` of shape (N, in_channels), ``scores`` of shape
    (N, num_classes). The state dict is that of LinearClsHead.

    Args:
        num_classes: Number of classes.
        in_channels: Number of features.
        dropout: Probability that a feature is dropped.
        **kwargs: As in LinearClsHead.

    Raises:
        ValueError: If ``dropout`` is not in [0, 1).

    Source:
        The authors' training of SSN on ImageNet has dropout of 0.5 before ``fc``, which none of
        mmpretrain's heads offers.
    """

    def __init__(self, num_classes: int, in_channels: int, dropout: float = 0.5, **kwargs) -> None:
        number = isinstance(dropout, int | float) and not isinstance(dropout, bool)
        if not number or not 0 <= dropout < 1:
            raise ValueError(f'dropout: got {dropout!r}, expected a number in [0, 1)')
        super().__init__(num_classes, in_channels, **kwargs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Classify the features of the last stage, (N, in_channels)."""
        return self.fc(self.dropout(self.pre_logits(feats)))
