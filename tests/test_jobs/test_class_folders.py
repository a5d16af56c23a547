"""Folders of class folders that do not fit each other or the head are told before a run."""

import pytest
from mmengine.config import Config

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.class_folders import check_class_folders
from ssn_plugin.jobs.preflight import check_data


def config(root, num_classes=2, kind='CustomDataset', **settings) -> Config:
    def loader(split):
        prefix = dict(split=split) if kind == 'ImageNet' else dict(data_prefix=split)
        dataset = dict(type=kind, data_root=str(root), **prefix) | settings
        return dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset))

    return Config(
        dict(
            model=dict(head=dict(num_classes=num_classes)),
            train_dataloader=loader('train'),
            val_dataloader=loader('val'),
            test_dataloader=loader('val'),
        )
    )


@pytest.fixture
def root(tmp_path):
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / 'README.txt').touch()
    return tmp_path


def message_of(cfg, splits=('train', 'val')) -> str:
    with pytest.raises(InputError) as caught:
        check_class_folders(cfg, splits)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('kind', ['CustomDataset', 'ImageNet', 'mmpretrain.ImageNet'])
def test_matching_folders_pass(root, kind):
    if kind.startswith('mmpretrain'):
        cfg = config(root, kind='ImageNet')
        cfg.train_dataloader.dataset.dataset.type = kind
    else:
        cfg = config(root, kind=kind)
    for split in ('train', 'val', 'test'):
        check_data(cfg, split)
    check_class_folders(cfg, ('train', 'val'))
    check_class_folders(cfg, ('test',))


def test_number_of_classes(root):
    text = message_of(config(root, num_classes=1000))
    assert 'model.head.num_classes: got 1000, expected 2' in text
    assert str(root / 'train') in text
    assert str(root / 'val') in message_of(config(root, num_classes=3), ('test',))


@pytest.mark.parametrize('kind', ['CustomDataset', 'ImageNet'])
def test_splits_with_other_classes(root, kind):
    """As many folders, but the labels of the second split would mean other classes."""
    (root / 'val' / 'dog').rename(root / 'val' / 'ant')
    text = message_of(config(root, kind=kind))
    assert 'val_dataloader.dataset.dataset' in text
    assert "only one of them has 'ant'" in text


def test_folder_without_classes(root):
    for name in ('cat', 'dog'):
        (root / 'train' / name).rmdir()
    assert f'no class folders in {root}/train' in message_of(config(root))


@pytest.mark.parametrize(
    'settings', [dict(ann_file='list.txt'), dict(with_label=False), dict(backend_args=dict())]
)
def test_what_names_its_classes_elsewhere_is_left_alone(root, settings):
    if 'backend_args' in settings:
        settings = dict(backend_args=dict(backend='petrel'))
    check_class_folders(config(root, num_classes=7, **settings), ('train', 'val'))


def test_imagenet_with_lists_of_files_is_left_alone(root):
    (root / 'meta').mkdir()
    for split in ('train', 'val'):
        (root / 'meta' / f'{split}.txt').touch()
    check_class_folders(config(root, num_classes=7, kind='ImageNet'), ('train', 'val'))
    assert 'got 7' in message_of(config(root, num_classes=7))


def test_other_data_sets_are_left_alone(root):
    cfg = config(root, num_classes=7)
    cfg.train_dataloader.dataset = dict(type='CocoDataset', data_root=str(root))
    check_class_folders(cfg, ('train',))
    check_class_folders(Config(dict(train_dataloader=None)), ('train', 'val'))


@pytest.mark.parametrize('kind', ['CustomDataset', 'ImageNet'])
def test_missing_folder_is_told_by_the_check_before(tmp_path, kind):
    with pytest.raises(InputError) as caught:
        check_data(config(tmp_path, kind=kind), 'train')
    assert f'no such file or folder: {tmp_path}/train' in str(caught.value)
    assert ('image-net.org' in str(caught.value)) == (kind == 'ImageNet')


def test_default_folder_is_made_or_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        check_data(config('data/imagefolder'), 'train')
    assert 'SSN_IMAGEFOLDER' in str(caught.value)
    assert 'tools/make_demo_image_folder.py data/imagefolder' in str(caught.value)
