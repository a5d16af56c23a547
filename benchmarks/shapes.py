"""Inputs of the norm layers in the shipped configs, at the sizes they train at.

``count`` is how many layers of the network have that input. A test compares this table with the
networks that the configs build.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """Input of a norm layer.

    Attributes:
        where: Network and place.
        size: (N, C, H, W).
        count: Layers of that network with this input.
    """

    where: str
    size: tuple[int, int, int, int]
    count: int


# configs/coco, ssn-all, 2 images of 800 x 1333, padded to 800 x 1344.
MASK_RCNN = (
    Shape('mask-rcnn stem', (2, 64, 400, 672), 1),
    Shape('mask-rcnn layer1', (2, 64, 200, 336), 6),
    Shape('mask-rcnn layer1 out, fpn p2', (2, 256, 200, 336), 6),
    Shape('mask-rcnn layer2 first', (2, 128, 200, 336), 1),
    Shape('mask-rcnn layer2', (2, 128, 100, 168), 7),
    Shape('mask-rcnn layer2 out', (2, 512, 100, 168), 5),
    Shape('mask-rcnn layer3 first, fpn p3', (2, 256, 100, 168), 3),
    Shape('mask-rcnn layer3, fpn p4', (2, 256, 50, 84), 13),
    Shape('mask-rcnn layer3 out', (2, 1024, 50, 84), 7),
    Shape('mask-rcnn layer4 first', (2, 512, 50, 84), 1),
    Shape('mask-rcnn layer4', (2, 512, 25, 42), 5),
    Shape('mask-rcnn layer4 out', (2, 2048, 25, 42), 4),
    Shape('mask-rcnn fpn p5', (2, 256, 25, 42), 2),
    Shape('mask-rcnn box head', (1024, 256, 7, 7), 4),
    Shape('mask-rcnn mask head', (256, 256, 14, 14), 4),
)
# configs/cityscapes, DeepLabV3+ ssn-all, 2 crops of 512 x 1024.
DEEPLAB = (
    Shape('deeplab stem', (2, 64, 256, 512), 1),
    Shape('deeplab layer1', (2, 64, 128, 256), 6),
    Shape('deeplab layer1 out', (2, 256, 128, 256), 4),
    Shape('deeplab layer2 first', (2, 128, 128, 256), 1),
    Shape('deeplab layer2', (2, 128, 64, 128), 7),
    Shape('deeplab layer3', (2, 256, 64, 128), 13),
    Shape('deeplab layer2 out, aspp', (2, 512, 64, 128), 16),
    Shape('deeplab layer3 out', (2, 1024, 64, 128), 7),
    Shape('deeplab layer4 out, aspp', (2, 2048, 64, 128), 7),
    Shape('deeplab image pool', (2, 512, 1, 1), 1),
    Shape('deeplab decoder first', (2, 560, 128, 256), 1),
    Shape('deeplab decoder', (2, 512, 128, 256), 3),
    Shape('deeplab shortcut', (2, 48, 128, 256), 1),
)
# configs/imagenet, ResNet-50, 32 images of 224 x 224.
IMAGENET = (
    Shape('imagenet stem', (32, 64, 112, 112), 1),
    Shape('imagenet layer1', (32, 64, 56, 56), 6),
    Shape('imagenet layer1 out', (32, 256, 56, 56), 4),
    Shape('imagenet layer2 first', (32, 128, 56, 56), 1),
    Shape('imagenet layer2', (32, 128, 28, 28), 7),
    Shape('imagenet layer2 out', (32, 512, 28, 28), 5),
    Shape('imagenet layer3 first', (32, 256, 28, 28), 1),
    Shape('imagenet layer3', (32, 256, 14, 14), 11),
    Shape('imagenet layer3 out', (32, 1024, 14, 14), 7),
    Shape('imagenet layer4 first', (32, 512, 14, 14), 1),
    Shape('imagenet layer4', (32, 512, 7, 7), 5),
    Shape('imagenet layer4 out', (32, 2048, 7, 7), 4),
)
SHAPES = MASK_RCNN + DEEPLAB + IMAGENET
