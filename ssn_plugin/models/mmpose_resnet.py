"""SSNResNet as an mmpose backbone. Importing this module imports mmpose."""

from mmpose.models.backbones import ResNet

from ssn_plugin.models.resnet import SSNResNetMixin


class SSNResNet(SSNResNetMixin, ResNet):
    """mmpose's ResNet (depth 18, 34, 50, 101, 152) for SSN; see :class:`SSNResNetMixin`."""
