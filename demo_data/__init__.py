"""Small data sets for all three tasks, made of scikit-image's photographs.

Needs NumPy, Pillow and scikit-image; nothing here imports mmdet or mmseg, and `import ssn_plugin`
does not import this package.
"""

from demo_data.classes import CLASSES, PALETTE, SEG_CLASSES, SEG_PALETTE
from demo_data.dataset import make_demo_dataset
from demo_data.image_folder import make_image_folder

__all__ = [
    'CLASSES',
    'PALETTE',
    'SEG_CLASSES',
    'SEG_PALETTE',
    'make_demo_dataset',
    'make_image_folder',
]
