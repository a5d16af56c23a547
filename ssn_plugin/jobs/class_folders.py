"""Checks folders of class folders before a classifier trains on them.

mmpretrain numbers classes by the sorted names of their folders, in each split for itself, and takes
the number of classes from the config: what does not match becomes wrong labels or a trace.
"""

import os

from mmengine.config import Config

from ssn_plugin.analysis.config_entries import data_folders, datasets_of, is_remote, type_name
from ssn_plugin.errors import InputError


def check_class_folders(config: Config, splits: tuple[str, ...]) -> None:
    """Compare the class folders of a config's data sets with each other and with its head.

    Data sets that name their classes in an annotation file, and those of other types than
    mmpretrain's CustomDataset and ImageNet, are left alone.

    ``splits`` are those that the run needs; their folders exist.

    Raises:
        InputError: If a split has no class folders or others than the first one, or their number is
            not ``model.head.num_classes``.
    """
    first_folder, first_classes = '', []
    for split in splits:
        for key, dataset in datasets_of(config, split):
            for folder in _folders_of_classes(dataset):
                classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
                if not classes:
                    raise InputError(f'{key}: no class folders in {folder}, expected one per class')
                if not first_classes:
                    first_folder, first_classes = folder, classes
                elif classes != first_classes:
                    other = sorted(set(classes) ^ set(first_classes))[0]
                    raise InputError(
                        f'{key}: the class folders of {folder} ({len(classes)}) are not those of '
                        f'{first_folder} ({len(first_classes)}): only one of them has {other!r}, '
                        'and classes are numbered by the order of their names'
                    )
    wanted = config.get('model', {}).get('head', {}).get('num_classes')
    if first_classes and wanted != len(first_classes):
        raise InputError(
            f'model.head.num_classes: got {wanted}, expected {len(first_classes)}, the number of '
            f'class folders in {first_folder}'
        )


def _folders_of_classes(dataset: dict) -> list[str]:
    kind = type_name(dataset)
    if kind not in ('CustomDataset', 'ImageNet') or dataset.get('ann_file'):
        return []
    root = str(dataset.get('data_root') or '')
    if dataset.get('with_label') is False or is_remote(dataset, root):
        return []
    lists = os.path.join(root, 'meta', f'{dataset.get("split")}.txt')
    # Where ImageNet has this list of files it needs no class folders.
    return [] if kind == 'ImageNet' and os.path.exists(lists) else data_folders(dataset)
