"""Class names and colours of the demo data set."""

CLASSES: tuple[str, ...] = ('coin', 'cup', 'horse', 'motorcycle')
"""Object classes in label order: 0 .. 3 for detection, COCO category ids 1 .. 4."""

PALETTE: tuple[tuple[int, int, int], ...] = (
    (255, 205, 40),
    (230, 60, 50),
    (60, 200, 110),
    (70, 120, 255),
)
"""RGB colour of each entry of `CLASSES`."""

SEG_CLASSES: tuple[str, ...] = ('background', *CLASSES)
"""Classes of semantic segmentation; background is label 0 and is scored like any other."""

SEG_PALETTE: tuple[tuple[int, int, int], ...] = ((60, 60, 60), *PALETTE)
"""RGB colour of each entry of `SEG_CLASSES`."""
