"""A few real images, or other samples, through the test pipeline of a config, in batches of one."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from torch.utils.data import Dataset

from ssn_plugin.analysis.config_entries import datasets_of, type_name
from ssn_plugin.errors import InputError, in_one_line
from ssn_plugin.jobs.preflight import check_datasets

# Whose test pipelines take an image file by its name; others take samples of their data set.
_OF_FILES = ('mmdet', 'mmseg', 'mmpretrain')
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def sample_images(config: Config, named: Sequence[str] = (), count: int = 4) -> list[str | int]:
    """Image files that a user names, or some of a config's test data set.

    Of data that are no image files, such as videos, and of frameworks whose pipelines want more
    than a file, it is the indices of samples in the test data set.

    Named files are all taken; of a named folder, or of the data set, ``count``, spread evenly.

    Raises:
        InputError: If there are none.
    """
    if not named:
        return _spread(_of_data_set(config), count, 'the test data set')
    return [file for name in named for file in _files(name, count)]


def _spread(found: list, count: int, where: str) -> list:
    if not found:
        raise InputError(f'images: got no image in {where}')
    count = min(count, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def _files(name: str, count: int) -> list[str]:
    path = Path(name)
    if path.is_dir():
        found = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        return _spread(found, count, name)
    if not path.is_file():
        raise InputError(f'images: no such file or folder: {name} (looked for from {os.getcwd()})')
    return [name]


def _of_data_set(config: Config) -> list[str] | list[int]:
    if not config.get('test_dataloader'):
        raise InputError('images: the config has no test_dataloader; name files by --images')
    check_datasets(config, 'test', 'name images by --images')
    with _reading_the_data_set():
        data = _test_data_set(config)
        if config.get('default_scope') not in _OF_FILES:
            return list(range(len(data)))
        infos = (data.get_data_info(index) for index in range(len(data)))
        return [info['img_path'] for info in infos if info.get('img_path')]


def _test_data_set(config: Config) -> Dataset:
    init_default_scope(config.get('default_scope', 'mmengine'))
    return DATASETS.build(copy.deepcopy(config.test_dataloader.dataset))


@contextlib.contextmanager
def _reading_the_data_set() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # from the registry or from the data set's own code
        raise InputError(
            f'images: cannot read the test data set: {in_one_line(error)}; name images by --images'
        ) from error


def sample_batches(config: Config, images: Sequence[str | int]) -> Iterator[dict]:
    """What a test data loader would give for samples, and for image files without annotations.

    Yields:
        Batches of one image each, before the model's data preprocessor.

    Raises:
        InputError: If the config has no test pipeline or an image cannot be read.
    """
    if images and all(isinstance(each, int) for each in images):
        with _reading_the_data_set():
            read = _test_data_set(config).__getitem__
    else:
        read = _pipeline_for_files(config)
    for index, image in enumerate(images):
        try:
            yield pseudo_collate([read(image if isinstance(image, int) else (image, index))])
        except Exception as error:
            # Decoders and transforms raise all kinds of errors.
            raise InputError(f'images: cannot read {image}: {in_one_line(error)}') from error


def _pipeline_for_files(config: Config) -> Callable[[tuple[str, int]], dict]:
    init_default_scope(config.get('default_scope', 'mmengine'))
    transforms = next((leaf.get('pipeline') for _, leaf in datasets_of(config, 'test')), None)
    if not transforms:
        raise InputError('images: the config has no test_dataloader.dataset.pipeline for them')
    transforms = copy.deepcopy(
        [each for each in transforms if not type_name(each).endswith('Annotations')]
    )
    try:
        pipeline = Compose(transforms)
    except Exception as error:
        raise InputError(f'images: cannot build the test pipeline: {in_one_line(error)}') from error
    return lambda image: pipeline({'img_path': image[0], 'img_id': image[1]})
