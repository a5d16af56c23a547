"""SSNResNet as an mmpretrain backbone. Importing this module imports mmpretrain."""

from mmpretrain.models.backbones import ResNet

from ssn_plugin.models.resnet import SSNResNetMixin


class SSNResNet(SSNResNetMixin, ResNet):
    """mmpretrain's ResNet (depth 18, 34, 50, 101, 152) for SSN; see :class:`SSNResNetMixin`."""
