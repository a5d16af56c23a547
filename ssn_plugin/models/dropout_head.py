"""DropoutLinearClsHead, built without importing mmpretrain before it is needed."""

from torch import nn


def build_dropout_linear_cls_head(**kwargs) -> nn.Module:
    """Build the classifier of the pre-training configs: dropout, then a linear layer.

    It stands in the root registry under 'DropoutLinearClsHead'.

    Args:
        **kwargs: ``num_classes``, ``in_channels``, ``dropout`` (0.5 unless given) and whatever
            mmpretrain's LinearClsHead takes (``loss``, ``topk``, ``cal_acc``, ``init_cfg``).

    Returns:
        An mmpretrain head.

    Raises:
        ImportError: If mmpretrain is not installed.
        ValueError: If ``dropout`` is not in [0, 1).

    Example:
        >>> head = dict(type='DropoutLinearClsHead', num_classes=1000, in_channels=2048)
    """
    from ssn_plugin.models.mmpretrain_dropout_head import DropoutLinearClsHead

    return DropoutLinearClsHead(**kwargs)
