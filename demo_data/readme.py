"""The README.md that accompanies a demo data set."""

from demo_data.classes import CLASSES, SEG_CLASSES
from demo_data.photographs import PHOTOGRAPHS

_TEXT = """\
# Demo data set of ssn_plugin

{num_train} training and {num_val} validation scenes of {size} pixels width: real objects, cut out
of photographs with their true masks, composed on photographed textures. Made by
`tools/make_demo_dataset.py` from the photographs inside the scikit-image wheel; it shows that
training works and measures nothing beyond that.

Classes, in order: {classes}.

## The same scenes in three layouts
| folder | layout | labels |
|---|---|---|
| `coco/` | COCO 2017 | category ids 1 .. {num_classes}; masks as uncompressed run lengths |
| `cityscapes/` | Cityscapes | `labelTrainIds`: 0 = background, then the classes; 255 is ignored |
| `ade/` | ADEChallengeData2016 | 0 = unlabeled, 1 = background, then the classes |

No pixel is unlabeled or ignored. `labelIds` are the train ids plus one; `instanceIds` are the label
ids, for objects times 1000 plus the number of the object.

`CocoDataset` takes the class names by `metainfo=dict(classes={classes_tuple})`.
`CityscapesDataset` and `ADE20KDataset` read the folders too, but accept no names outside their own
19 and 150: left alone they call label 0 "road" and "wall". For the true names use mmseg's
`BaseSegDataset` with the suffixes of the layout:

```python
seg_classes = {seg_classes_tuple}
cityscapes = dict(
    type='BaseSegDataset',
    metainfo=dict(classes=seg_classes),
    img_suffix='_leftImg8bit.png',
    seg_map_suffix='_gtFine_labelTrainIds.png',
    data_root='cityscapes',
    data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'))
ade = dict(
    type='BaseSegDataset',
    metainfo=dict(classes=seg_classes),
    reduce_zero_label=True,
    data_root='ade',
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'))
```

## What validation holds out
| class | masks from | held out |
|---|---|---|
| coin | segmentation of each of 24 coins | 6 of the 24 coins |
| cup | outline drawn by hand (cup, saucer, spoon handle) | nothing: one photograph, new scenes |
| horse | a silhouette without inner texture, clothed in fur of the cat | \
the part of the fur; the outline is the same |
| motorcycle | measured stereo disparity | the right camera's photograph of the same motorcycle |
| background | | the right part of every photograph; training uses the left one |

Every scene draws its own position, size, rotation, mirroring and light. An object that others cover
keeps at least 30 % of its area visible, and its mask is the visible part.

## Photographs
All from scikit-image, folder `skimage/data`; origin and licence as scikit-image states them.

| file | shows | origin | licence |
|---|---|---|---|
{photographs}

## Made with
seed {seed}; {versions}. The same settings on the same versions give the same bytes.
"""


def readme(settings: dict[str, int], versions: dict[str, str]) -> str:
    """The text for a data set of these settings, made with these versions of the libraries."""
    return _TEXT.format(
        num_train=settings['num_train'],
        num_val=settings['num_val'],
        size=settings['size'],
        seed=settings['seed'],
        num_classes=len(CLASSES),
        classes=', '.join(CLASSES),
        classes_tuple=CLASSES,
        seg_classes_tuple=SEG_CLASSES,
        photographs='\n'.join(
            f'| `{photo.file}` | {photo.subject} | {photo.origin} | {photo.licence} |'
            for photo in PHOTOGRAPHS.values()
        ),
        versions=', '.join(f'{name} {number}' for name, number in versions.items()),
    )
