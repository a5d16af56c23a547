"""What is missing is named in one line, with where it was looked for and how to get it."""

import pytest
import torch
from mmengine.config import Config

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.configs import load_config
from ssn_plugin.jobs.preflight import (
    check_checkpoint,
    check_checkpoints,
    check_data,
    check_resumable,
    check_work_dir,
)


def message_of(call, *args) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    text = str(caught.value)
    assert '\n' not in text
    return text


def coco(root) -> Config:
    dataset = dict(
        type='CocoDataset', data_root=str(root), ann_file='ann.json', data_prefix=dict(img='img/')
    )
    return Config(
        dict(
            train_dataloader=dict(dataset=dataset),
            val_dataloader=dict(
                dataset=dict(
                    type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[dataset])
                )
            ),
            val_evaluator=dict(type='CocoMetric', ann_file=str(root / 'val.json')),
        )
    )


def test_missing_config(tmp_path):
    assert 'no such file: ' in message_of(load_config, str(tmp_path / 'a.py'))


def test_config_that_does_not_parse(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text('model = dict(')
    assert str(path) in message_of(load_config, str(path))


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        ('import sys\nsys.exit(3)', 'SystemExit: 3'),
        ('model = [1]', 'model: got a list, expected a dict'),
        ("model = 'a'", 'model: got a str, expected a dict'),
        ('train_dataloader = 5', 'train_dataloader: got a int, expected a dict'),
        ('test_dataloader = dict(batch_size=1)', 'test_dataloader.dataset: got nothing'),
        ('val_dataloader = dict(dataset=[1])', 'val_dataloader.dataset: got a list'),
        ('load_from = dict(a=1)', 'load_from: got a ConfigDict, expected the path'),
        ('default_scope = 5', "default_scope: got a int, expected a package such as 'mmdet'"),
        ('work_dir = 5', 'work_dir: got a int, expected the path'),
        ("custom_hooks = 'SSNRadiusHook'", 'custom_hooks: got a str, expected a list'),
        ("custom_hooks = [dict(type='A'), 'B']", 'custom_hooks[1]: got a str, expected a dict'),
        ('test_evaluator = [5]', 'test_evaluator[0]: got a int, expected a dict'),
        ('env_cfg = 5', 'env_cfg: got a int, expected a dict'),
    ],
)
def test_entries_that_are_no_dicts(tmp_path, content, said):
    path = tmp_path / 'a.py'
    path.write_text(content)
    assert said in message_of(load_config, str(path))


def test_options_are_merged(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text('model = dict(depth=18)')
    assert load_config(str(path), {'model.depth': 50}).model.depth == 50


def test_missing_annotations_and_images(tmp_path):
    config = coco(tmp_path)
    text = message_of(check_data, config, 'train')
    assert 'train_dataloader.dataset' in text
    assert str(tmp_path / 'ann.json') in text
    assert 'cocodataset.org' in text
    (tmp_path / 'ann.json').touch()
    assert str(tmp_path / 'img') in message_of(check_data, config, 'train')
    (tmp_path / 'img').mkdir()
    check_data(config, 'train')


def test_wrapped_datasets_and_evaluators_are_looked_into(tmp_path):
    config = coco(tmp_path)
    assert 'val_dataloader.dataset.dataset.datasets.0' in message_of(check_data, config, 'val')
    (tmp_path / 'ann.json').touch()
    (tmp_path / 'img').mkdir()
    assert 'val_evaluator.ann_file' in message_of(check_data, config, 'val')
    (tmp_path / 'val.json').touch()
    check_data(config, 'val')


def test_no_loader_needs_nothing():
    check_data(Config(dict(test_dataloader=None)), 'test')
    check_data(Config(dict()), 'train')


def test_demo_data_is_made_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = dict(type='CocoDataset', data_root='data/demo/coco/', ann_file='a.json')
    config = Config(dict(train_dataloader=dict(dataset=dataset)))
    assert 'tools/make_demo_dataset.py data/demo' in message_of(check_data, config, 'train')


def pretrained(checkpoint) -> Config:
    init = dict(type='Pretrained', checkpoint=str(checkpoint))
    return Config(dict(model=dict(backbone=dict(type='ResNet', init_cfg=init))))


def test_missing_weights(tmp_path):
    path = tmp_path / 'weights.pth'
    text = message_of(check_checkpoints, pretrained(path))
    assert 'model.backbone.init_cfg.checkpoint' in text
    assert str(path) in text
    assert '--cfg-options model.backbone.init_cfg=None' in text
    torch.save({}, path)
    check_checkpoints(pretrained(path))


def test_missing_load_from(tmp_path):
    assert 'load_from' in message_of(
        check_checkpoints, Config(dict(load_from=str(tmp_path / 'a.pth')))
    )


def test_weights_behind_an_unknown_address():
    # Nothing listens on this port of this machine.
    text = message_of(check_checkpoints, pretrained('http://127.0.0.1:9/weights.pth'))
    assert 'http://127.0.0.1:9/weights.pth: cannot be read: URLError' in text


def test_missing_checkpoint_argument(tmp_path):
    assert message_of(check_checkpoint, 'checkpoint', str(tmp_path / 'a.pth')).startswith(
        'checkpoint: '
    )


def test_work_dir_that_is_a_file(tmp_path):
    path = tmp_path / 'file'
    path.touch()
    assert str(path) in message_of(check_work_dir, str(path))
    assert str(path) in message_of(check_work_dir, str(path / 'below'))


@pytest.mark.parametrize('content', [b'', b'<html>not found</html>'], ids=['empty', 'page'])
def test_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    for text in (
        message_of(check_checkpoint, 'checkpoint', str(path)),
        message_of(check_checkpoints, pretrained(path)),
    ):
        assert f'{path}: ' in text
        assert 'not a checkpoint of torch' in text


def test_every_way_to_name_weights_is_looked_at(tmp_path):
    path = str(tmp_path / 'weights.pth')
    init = dict(type='Pretrained', checkpoint=path)
    for model, key in (
        (dict(pretrained=path), 'model.pretrained'),
        (dict(neck=dict(init_cfg=[dict(type='Xavier'), init])), 'model.neck.init_cfg.1.checkpoint'),
        (dict(teachers=[dict(init_cfg=init)]), 'model.teachers.0.init_cfg.checkpoint'),
    ):
        assert key in message_of(check_checkpoints, Config(dict(model=model)))
    check_checkpoints(Config(dict(model=dict(pretrained=None, init_cfg=dict(type='Kaiming')))))


@pytest.mark.parametrize(
    ('key', 'name', 'found'),
    [
        ('teacher_ckpt', 'none.pth', True),
        ('diffusion_cfg.checkpoint', 'none.pt', True),
        ('class_embed_path', 'none.pth', True),
        ('vision_encoder_weight', 'none.pth.tar', True),
        ('teacher_ckpt', 'unknown-address://net', True),
        ('init_cfg.pretrained_model_path', 'unknown-address://net', True),
        ('teacher_config', 'none.py', False),
        ('image_url', 'https://127.0.0.1:9/image.png', False),
    ],
)
def test_weights_under_any_name(tmp_path, key, name, found):
    name = name if '://' in name else str(tmp_path / name)
    config = Config(dict(model=dict(type='Detector')))
    config.merge_from_dict({f'model.{key}': name})
    for training in (True, False):  # some parts of a model read them whenever they are built
        if found:
            text = message_of(check_checkpoints, config, training)
            assert f'--cfg-options model.{key}=None' in text
        else:
            check_checkpoints(config, training)


def test_a_test_needs_no_initial_weights(tmp_path):
    path = str(tmp_path / 'none.pth')
    config = pretrained(path)
    config.model.pretrained = config.load_from = path
    check_checkpoints(config, training=False)


def interrupted(**changes) -> dict:
    meta = dict(epoch=1, iter=5) | changes.pop('meta', {})
    return dict(meta=meta, state_dict={}, message_hub={}) | changes


def test_what_no_training_can_go_on_from(tmp_path):
    path = tmp_path / 'net.pth'
    torch.save(interrupted(), path)
    check_resumable(str(path))
    for lacks, checkpoint in (
        ('state_dict, epoch, iter, message_hub', {'a': torch.ones(1)}),
        ('epoch, iter', interrupted() | {'meta': None}),
        ('message_hub', {k: v for k, v in interrupted().items() if k != 'message_hub'}),
    ):
        torch.save(checkpoint, path)
        text = message_of(check_resumable, str(path))
        assert f'it lacks {lacks}; ' in text
        assert f'set load_from={path} and resume=False' in text
    assert message_of(check_resumable, str(tmp_path / 'a.pth')).startswith('resume: ')


@pytest.mark.parametrize('entry', ['backend_args', 'file_client_args'])
def test_data_elsewhere_are_not_looked_for_on_the_disk(tmp_path, entry):
    config = coco(tmp_path)
    dataset = config.train_dataloader.dataset
    for backend in ('petrel', 'http'):
        config.val_evaluator[entry] = dataset[entry] = dict(backend=backend)
        config.val_dataloader = config.train_dataloader
        check_data(config, 'train')
        check_data(config, 'val')
    dataset[entry] = dict(backend='local')
    assert 'ann.json' in message_of(check_data, config, 'train')
    del dataset[entry]
    dataset.data_root = 's3://bucket/coco'
    config.val_evaluator = dict(ann_file='s3://bucket/coco/ann.json')
    check_data(config, 'train')
    check_data(config, 'val')


def test_data_root_that_is_no_path():
    dataset = dict(type='CocoDataset', data_root=5, ann_file='a.json')
    assert '5/a.json' in message_of(
        check_data, Config(dict(train_dataloader=dict(dataset=dataset))), 'train'
    )
