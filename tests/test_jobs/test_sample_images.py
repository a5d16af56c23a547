"""Which images are taken, and how a test pipeline reads them without annotations."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from torch.utils.data import Dataset

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.sample_images import sample_batches, sample_images

PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(20, 10), keep_ratio=False),
    dict(type='PackSegInputs'),
]


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())


@pytest.fixture
def config(tmp_path) -> Config:
    """A data set of ten images without labels."""
    for index in range(10):
        cv2.imwrite(str(tmp_path / f'{index}.png'), np.full((6, 8, 3), index, np.uint8))
    prefix = dict(img_path=str(tmp_path))
    dataset = dict(type='BaseSegDataset', data_prefix=prefix, img_suffix='.png', pipeline=PIPELINE)
    return Config(dict(default_scope='mmseg', test_dataloader=dict(dataset=dataset)))


def stems(paths: list[str]) -> list[str]:
    return [Path(path).stem for path in paths]


def test_images_are_spread_over_what_there_is(config, tmp_path):
    for named in ([], [str(tmp_path)]):
        assert stems(sample_images(config, named, 4)) == ['0', '2', '5', '7']
        assert len(sample_images(config, named, 99)) == 10
    files = [str(tmp_path / '9.png'), str(tmp_path / '1.png')]
    assert sample_images(config, files, 1) == files
    assert stems(sample_images(config, [*files, str(tmp_path)], 1)) == ['9', '1', '0']


def test_a_config_without_test_data():
    config = Config(dict(default_scope='mmseg'))
    with pytest.raises(InputError, match='no test_dataloader; name files by --images'):
        sample_images(config)
    with pytest.raises(InputError, match=r'no test_dataloader.dataset.pipeline'):
        next(sample_batches(config, ['a.png']))


def test_batches(config, tmp_path):
    batches = list(sample_batches(config, sample_images(config, count=2)))
    assert [int(batch['inputs'][0].max()) for batch in batches] == [0, 5]
    assert batches[0]['inputs'][0].shape == (3, 10, 20)
    assert batches[1]['data_samples'][0].img_path == str(tmp_path / '5.png')
    # As before: the config still reads annotations.
    assert config.test_dataloader.dataset.pipeline == PIPELINE


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (dict(type='NoSuchSet'), r'cannot read the test data set: KeyError: .*NoSuchSet'),
        (dict(img_suffix='.none'), r'cannot read the test data set: \w+Error: .*--images'),
        (
            dict(data_prefix=dict(img_path='nowhere')),
            r'dataset: no such file or folder: nowhere .*, or name images by --images$',
        ),
    ],
)
def test_a_data_set_that_cannot_be_read(config, change, said):
    config.test_dataloader.dataset.update(change)
    with pytest.raises(InputError, match=said):
        sample_images(config)


def test_a_pipeline_that_cannot_be_built(config, tmp_path):
    config.test_dataloader.dataset.pipeline.append(dict(type='NoSuchTransform'))
    with pytest.raises(InputError, match=r'cannot build the test pipeline: KeyError: .*NoSuch'):
        next(sample_batches(config, [str(tmp_path / '0.png')]))


def test_samples_of_data_that_are_no_image_files(tmp_path):
    """As of videos: the data set itself reads them, annotations and all."""

    @DATASETS.register_module(force=True)
    class Clips(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return dict(inputs=torch.full((3, 8, 4, 4), index))

    loader = dict(dataset=dict(type='Clips'))
    config = Config(dict(default_scope='mmengine', test_dataloader=loader))
    chosen = sample_images(config, count=3)
    assert chosen == [0, 3, 6]
    batches = list(sample_batches(config, chosen))
    assert [int(batch['inputs'][0].unique()) for batch in batches] == chosen
    config.test_dataloader.dataset.type = 'Clip'
    with pytest.raises(InputError, match='cannot read the test data set'):
        sample_images(config)
