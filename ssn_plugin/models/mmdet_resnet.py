"""SSNResNet as an mmdet backbone. Importing this module imports mmdet."""

from mmdet.models.backbones import ResNet

from ssn_plugin.models.resnet import SSNResNetMixin


class SSNResNet(SSNResNetMixin, ResNet):
    """mmdet's ResNet (depth 18, 34, 50, 101, 152) for SSN; see :class:`SSNResNetMixin`."""
