"""A small training run for a process of its own, which says how far it is and may be killed.

Its data are augmented with all three generators of random numbers and its model has dropout, so
that nothing but a true continuation ends with the same weights.
"""

import os
import random
import resource
import signal
from multiprocessing.connection import Connection

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch._dynamo
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from ssn_plugin import SSN
from ssn_plugin.errors import CheckpointError

# What a Runner imports and draws when it is built: here once, and not in every process.
plt.close(plt.figure())

NUM_SAMPLES, BATCH_SIZE, ITERATIONS = 24, 4, 30


@DATASETS.register_module()
class AugmentedNoise(Dataset):
    """Images of different mean and spread, flipped, shifted and disturbed."""

    def __init__(self, augment=True):
        self.augment = augment
        generator = torch.Generator().manual_seed(0)
        self.scale = torch.linspace(0.5, 3, NUM_SAMPLES)[:, None, None, None]
        self.images = torch.randn(NUM_SAMPLES, 2, 8, 8, generator=generator) * self.scale
        self.images += self.scale

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        image = self.images[index]
        if self.augment:
            if random.random() < 0.5:
                image = image.flip(-1)
            image = image + float(np.random.randn()) + 0.3 * torch.randn_like(image)
        return dict(inputs=image, data_samples=self.scale[index].flatten())


@MODELS.register_module()
class DropoutNet(BaseModel):
    """Three convolutions with norms, dropout and a head, and bytes that make its files large."""

    def __init__(self, ballast=1_000_000):
        super().__init__()
        self.register_buffer('ballast', torch.zeros(ballast, dtype=torch.uint8))
        layers, before, channels = [], 2, 6
        for _ in range(3):
            layers += [nn.Conv2d(before, channels, 3, padding=1), SSN(channels), nn.ReLU()]
            before = channels
        self.features = nn.Sequential(*layers, nn.Dropout2d(0.2))
        self.head = nn.Linear(channels, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        outputs = self.head(self.features(inputs).mean((2, 3)))
        if mode == 'loss':
            return dict(loss=(outputs - data_samples).square().mean())
        return outputs


@METRICS.register_module()
class LastOutput:
    """A score that goes up and down; random numbers are drawn, as any metric may."""

    dataset_meta = None
    prefix = None

    def process(self, data_batch, data_samples):
        torch.rand(3), random.random(), np.random.rand()
        self.score = float(data_samples[-1])

    def evaluate(self, size):
        return dict(score=self.score)


@HOOKS.register_module()
class TellHook(Hook):
    """Send the number of each iteration that begins, and how many choices are frozen."""

    priority = 'LOW'
    connection: Connection

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        norms = [m for m in runner.model.modules() if isinstance(m, SSN)]
        self.connection.send((runner.iter, int(sum(m.mean_fixed + m.var_fixed for m in norms))))


def config(work_dir: str, by_epoch: bool, num_workers: int = 0, **changes) -> dict:
    """Arguments of a Runner.

    Args:
        work_dir: Where checkpoints go.
        by_epoch: Which loop.
        num_workers: Of the data loader.
        **changes: Entries to replace.
    """
    loader = dict(
        dataset=dict(type='AugmentedNoise'),
        batch_size=BATCH_SIZE,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=dict(type='default_collate'),
    )
    epoch = NUM_SAMPLES // BATCH_SIZE
    schedule = dict(max_epochs=ITERATIONS // epoch) if by_epoch else dict(max_iters=ITERATIONS)
    interval = 1 if by_epoch else 5
    sampler = dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True)
    checkpoint = dict(type='SSNCheckpointHook', by_epoch=by_epoch, max_keep_ckpts=1)
    checkpoint |= dict(interval=1, save_best='score', rule='greater')
    return (
        dict(
            work_dir=work_dir,
            model=dict(type='DropoutNet'),
            train_dataloader=dict(loader, sampler=sampler),
            train_cfg=dict(by_epoch=by_epoch, val_interval=interval, **schedule),
            val_dataloader=dict(
                loader,
                dataset=dict(type='AugmentedNoise', augment=False),
                sampler=dict(type='DefaultSampler', shuffle=False),
            ),
            val_cfg=dict(),
            val_evaluator=dict(type='LastOutput'),
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-3),
                constructor='SSNOptimWrapperConstructor',
                # Control parameters move apart, so that layers freeze at different iterations.
                paramwise_cfg=dict(ssn_lr_mult=20.0),
            ),
            param_scheduler=dict(type='LinearLR', start_factor=0.5, end=20, by_epoch=False),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=10), checkpoint=checkpoint),
            custom_hooks=[dict(type=f'SSN{kind}Hook') for kind in ('Resume', 'Radius', 'Ratio')],
            log_processor=dict(by_epoch=by_epoch),
            log_level='ERROR',
            experiment_name='interrupted',
            default_scope='mmengine',
            randomness=dict(seed=3),
        )
        | changes
    )


def train(settings: dict, connection: Connection, file_limit: int | None = None) -> None:
    """Train, from the last checkpoint on if there is one, in a process started for it.

    Args:
        settings: For the Runner.
        connection: Where to tell how far it is, and what went wrong.
        file_limit: Bytes after which writing to a file fails, as on a full disk.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'  # for mmengine 0.10.7
    torch.set_num_threads(1)
    Runner._log_env = lambda *_: None  # asks compilers, for seconds
    runner = Runner(**settings, resume=os.path.exists(settings['work_dir'] + '/last_checkpoint'))
    tell = TellHook()
    tell.connection = connection
    runner.register_hook(tell)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        runner.train()
    except CheckpointError as error:
        connection.send(str(error))
