"""Checks what a config needs from the disk before a run starts: one clear line, not a trace."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from mmengine.config import Config
from torch import nn

from ssn_plugin.analysis.config_entries import (
    NamedCheckpoint,
    as_list,
    checkpoints_in,
    data_folders,
    datasets_of,
    is_remote,
    type_name,
)
from ssn_plugin.checkpoint.files import meta_in, read_file
from ssn_plugin.errors import CheckpointError, InputError
from ssn_plugin.jobs.model_check import check_norms
from ssn_plugin.models.pretrained import load_checkpoint

_HOW_TO_GET = {
    'CocoDataset': 'COCO 2017 images and annotations are at https://cocodataset.org/#download',
    'CityscapesDataset': (
        'Cityscapes (leftImg8bit and gtFine) is at https://www.cityscapes-dataset.com/downloads, '
        'its labelTrainIds.png are made by mmseg/tools/dataset_converters/cityscapes.py'
    ),
    'ADE20KDataset': (
        'ADE20K is ADEChallengeData2016.zip at '
        'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip'
    ),
    'ImageNet': (
        'ImageNet-1k (ILSVRC 2012) is at https://image-net.org/download, one folder per class '
        'belongs into train/ and into val/'
    ),
    'CustomDataset': 'it holds one folder of images per class',
}
_DEMO_DATA = 'data/demo/'
_DEMO_FOLDER = 'data/imagefolder'


def check_data(config: Config, split: str) -> None:
    """Look for the files and folders of a data loader and of its evaluator.

    Raises:
        InputError: Naming what is missing, where it was looked for and how to get it.
    """
    if not config.get(f'{split}_dataloader'):
        return
    check_datasets(config, split, 'point {key}.data_root elsewhere with --cfg-options')
    for evaluator in as_list(config.get(f'{split}_evaluator')):
        path = evaluator.get('ann_file')
        local = isinstance(path, str) and not is_remote(evaluator, path)
        if local and not os.path.exists(path):
            raise InputError(
                f'{split}_evaluator.ann_file: no such file: {path}; set it to the ann_file of '
                f'{split}_dataloader.dataset with --cfg-options'
            )


def check_datasets(config: Config, split: str, remedy: str) -> None:
    """Look for the files and folders of a data loader.

    ``remedy`` says what else a user can do; ``{key}`` in it becomes the place in the config.

    Raises:
        InputError: Naming what is missing, where it was looked for and how to get it.
    """
    for key, dataset in datasets_of(config, split):
        root = str(dataset.get('data_root') or '')
        wanted = data_folders(dataset)
        if isinstance(dataset.get('ann_file'), str) and dataset['ann_file']:
            wanted = [os.path.join(root, dataset['ann_file']), *wanted]
        for path in wanted:
            if not is_remote(dataset, path) and not os.path.exists(path):
                raise InputError(
                    f'{key}: no such file or folder: {path} (data_root={root!r}, looked for from '
                    f'{os.getcwd()}); {_advice(dataset, path)}, or '
                    f'{remedy.format(key=key)}'
                )


def _advice(dataset: dict, path: str) -> str:
    if path.startswith(_DEMO_DATA):
        return f'make it with `python tools/make_demo_dataset.py {_DEMO_DATA.rstrip("/")}`'
    if path.startswith(_DEMO_FOLDER):
        return (
            'name your folder of class folders by the variable SSN_IMAGEFOLDER, or make one with '
            f'`python tools/make_demo_image_folder.py {_DEMO_FOLDER}`'
        )
    return _HOW_TO_GET.get(type_name(dataset), 'put it there')


def check_checkpoints(
    config: Config, training: bool = True, model: nn.Module | None = None
) -> None:
    """Look at the files of weights that a config names, whatever the entries are called.

    Each is loaded once. For a name with a scheme (``torchvision://``, ``https://``) only the first
    process of a machine does so, and the others find it in the cache.

    Args:
        config: The whole config.
        training: Whether the run starts from weights; in a test only those are read that parts of
            the model read while they are built, such as ``teacher_ckpt``.
        model: What is trained; the files that it starts from have to have its norms.

    Raises:
        InputError: Naming the entry and the file, and how to get it or do without.
    """
    wanted = [
        entry
        for entry in checkpoints_in(config.get('model', {}), 'model')
        if training or not entry.initial
    ]
    if training and isinstance(config.get('load_from'), str):
        wanted.append(NamedCheckpoint('load_from', 'load_from', config.load_from, True))
    for key, switch, path, initial in wanted:
        if '://' in path and int(os.environ.get('LOCAL_RANK', 0)) != 0:
            continue
        # A part that reads a file while it is built may expect something else than a state dict.
        checkpoint = check_checkpoint(
            key,
            path,
            load_checkpoint if initial or '://' in path else read_file,
            advice=f'; name another file by --cfg-options {key}=FILE, '
            f'or do without it by --cfg-options {switch}=None',
        )
        if initial and model is not None:
            check_norms(model, key, path, checkpoint)


def check_checkpoint(
    name: str, path: str, read: Callable = load_checkpoint, advice: str = ''
) -> Mapping:
    """Load a checkpoint once, to see that it can be; return what it holds.

    ``name`` is the argument or config entry that names it and ``advice`` what to do about it, for
    the error.

    Raises:
        InputError: If there is no such file or it cannot be loaded.
    """
    try:
        return read(path)
    except CheckpointError as error:
        raise InputError(f'{name}: {error}{advice}') from error


def check_resumable(path: str) -> None:
    """Load the checkpoint that a run goes on from, and see that a run has left it.

    Raises:
        InputError: If it cannot be loaded, or lacks what mmengine goes on with.
    """
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        raise InputError(f'resume: {error}') from error
    known = {*checkpoint, *meta_in(checkpoint)}
    lacking = [key for key in ('state_dict', 'epoch', 'iter', 'message_hub') if key not in known]
    if lacking:
        raise InputError(
            f'resume: {path}: no training can go on from it: it lacks {", ".join(lacking)}; to '
            f'start from its weights, set load_from={path} and resume=False'
        )


def check_work_dir(path: str) -> None:
    """Make the folder a run writes to.

    Raises:
        InputError: If it cannot be made or written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'work_dir: cannot make {path}: {error.strerror}') from error
    if not os.access(path, os.W_OK):
        raise InputError(f'work_dir: cannot write to {path}')
