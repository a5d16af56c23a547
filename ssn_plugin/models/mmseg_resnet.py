"""SSNResNet as an mmseg backbone. Importing this module imports mmseg."""

from mmseg.models.backbones import ResNet

from ssn_plugin.models.resnet import SSNResNetMixin


class SSNResNet(SSNResNetMixin, ResNet):
    """mmseg's ResNet (depth 18, 34, 50, 101, 152) for SSN; see :class:`SSNResNetMixin`."""
