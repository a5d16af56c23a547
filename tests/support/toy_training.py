"""A toy model with two norms, toy data, and runners that train it in a fraction of a second."""

import logging

import pytest
import torch
from mmcv.cnn import build_norm_layer
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import Dataset

from ssn_plugin import SSN


class ToyNet(BaseModel):
    """Two 3x3 convolutions with norms and a linear head; notes the radii of training forwards."""

    def __init__(self, norm_cfg=None, second_norm_cfg=None, data_preprocessor=None):
        super().__init__(data_preprocessor=data_preprocessor)
        norm_cfg = dict(type='SSN') if norm_cfg is None else norm_cfg
        self.conv1 = nn.Conv2d(2, 4, 3, bias=False)
        self.norm1 = build_norm_layer(norm_cfg, 4)[1]
        self.conv2 = nn.Conv2d(4, 4, 3, bias=False)
        self.norm2 = build_norm_layer(second_norm_cfg or norm_cfg, 4)[1]
        self.head = nn.Linear(4, 1)
        self.radii = []

    def forward(self, inputs, data_samples=None, mode='tensor'):
        norms = [norm for norm in (self.norm1, self.norm2) if isinstance(norm, SSN)]
        if self.training:
            self.radii.append(tuple(norm.radius.item() for norm in norms))
        features = self.norm1(self.conv1(inputs)).relu()
        features = self.norm2(self.conv2(features)).relu()
        outputs = self.head(features.square().mean((2, 3)))[:, 0]
        if mode == 'loss':
            return dict(loss=(outputs - data_samples).square().mean())
        return outputs


class ToyImages(Dataset):
    """Twelve images of different mean and spread, so that the candidates differ from each other."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(12, 2, 8, 8, generator=generator)
        self.scale = torch.linspace(0.5, 3, 12)
        self.inputs = noise * self.scale[:, None, None, None] + self.scale[:, None, None, None]

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return dict(inputs=self.inputs[index], data_samples=self.scale[index])


class ToyMetric:
    """An evaluator's metric that needs no ground truth and keeps nothing."""

    dataset_meta = None
    prefix = None

    def process(self, data_batch, data_samples):
        pass

    def evaluate(self, size):
        return dict(size=size)


@pytest.fixture(autouse=True)
def _toys():
    """Register the toys, and leave mmengine's global state as it was found."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only lose time to threads
    for registry, toy in ((MODELS, ToyNet), (DATASETS, ToyImages), (METRICS, ToyMetric)):
        registry.register_module(module=toy, force=True)
    yield
    torch.set_num_threads(threads)
    logging.shutdown()
    for manager in (MMLogger, MessageHub, Visualizer, DefaultScope):
        manager._instance_dict.clear()
    for registry, toy in ((MODELS, ToyNet), (DATASETS, ToyImages), (METRICS, ToyMetric)):
        registry.module_dict.pop(toy.__name__)


@pytest.fixture
def make_runner(tmp_path, monkeypatch):
    """A function that builds a runner: 12 iterations, iteration-based or 3 epochs of 4."""
    monkeypatch.setattr(Runner, '_log_env', lambda *_: None)  # asks compilers, for seconds
    # mmengine 0.10.7 cannot read its own checkpoints otherwise, with torch 2.6 or newer
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    count = 0

    def make(by_epoch=False, hooks=(dict(type='SSNRadiusHook'),), **overrides):
        nonlocal count
        count += 1
        sampler = dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True)
        loader = dict(
            dataset=dict(type='ToyImages'),
            batch_size=3,
            num_workers=0,
            collate_fn=dict(type='default_collate'),
        )
        cfg = dict(
            work_dir=str(tmp_path / f'run{count}'),
            model=dict(type='ToyNet'),
            train_dataloader=dict(loader, sampler=sampler),
            train_cfg=dict(by_epoch=True, max_epochs=3) if by_epoch else dict(max_iters=12),
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-3),
                constructor='SSNOptimWrapperConstructor',
                # at a tenth of the learning rate twelve iterations would hardly move the ratios
                paramwise_cfg=dict(ssn_lr_mult=1.0),
            ),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=1),
                checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=by_epoch),
            ),
            custom_hooks=list(hooks),
            log_processor=dict(by_epoch=by_epoch),
            randomness=dict(seed=0),
            experiment_name=f'toy{count}',
            default_scope='mmengine',
        )
        if not by_epoch:
            cfg['train_cfg']['by_epoch'] = False
        if overrides.pop('validate', False):
            cfg |= dict(
                val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
                val_cfg=dict(),
                val_evaluator=dict(type='ToyMetric'),
            )
        return Runner(**(cfg | overrides))  # without a Config, whose printing takes a second

    return make
