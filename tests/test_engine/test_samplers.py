"""SSNResumeHook with every sampler: a resumed run ends as one that was not interrupted."""

import random
from pathlib import Path

import mmengine
import numpy as np
import pytest
import torch
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import Dataset, RandomSampler

RADIUS = dict(type='SSNRadiusHook')
RESUME = dict(type='SSNResumeHook')


@DATASETS.register_module(force=True)
class NoisyImages(Dataset):
    """The toy images with noise of all three generators, and what samplers ask data for."""

    @property
    def metainfo(self):
        return dict(classes=('even', 'odd'))

    def __init__(self):
        self.images = DATASETS.build(dict(type='ToyImages'))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        assert type(index) is int
        item = self.images[index]
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        return dict(item, inputs=item['inputs'] + noise)

    def get_data_info(self, index):
        return dict(width=1 + index % 2, height=2 - index % 2)

    def get_cat_ids(self, index):
        return [index % 2]


@DATASETS.register_module(force=True)
class TwoSources(Dataset):
    """Two data sets in a row, as a ConcatDataset."""

    def __init__(self):
        self.datasets = [NoisyImages(), NoisyImages()]
        self.cumulative_sizes = [12, 24]

    metainfo = NoisyImages.metainfo

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return self.datasets[index // 12][index % 12]

    def get_data_info(self, index):
        return self.datasets[0].get_data_info(index)

    def get_dataset_source(self, index):
        return index // 12


@DATA_SAMPLERS.register_module(force=True)
class OfTorch(RandomSampler):
    """torch's own, which draws its order from the global generator."""

    def __init__(self, dataset, seed=None):
        super().__init__(dataset)


ONE, TWO = dict(type='NoisyImages'), dict(type='TwoSources')
SAMPLERS = {
    'default': (ONE, dict(type='DefaultSampler', shuffle=True), None),
    'in_order': (ONE, dict(type='DefaultSampler', shuffle=False), None),
    'torch': (ONE, dict(type='OfTorch'), None),
    'class_aware': (ONE, dict(type='mmdet.ClassAwareSampler'), None),
    'aspect_ratio': (
        ONE,
        dict(type='DefaultSampler', shuffle=True),
        dict(type='mmdet.AspectRatioBatchSampler'),
    ),
    'sizes': (TWO, dict(type='mmdet.CustomSampleSizeSampler', dataset_size=[6, -1]), None),
    'ratios': (TWO, dict(type='mmdet.MultiDataSampler', dataset_ratio=[1, 2]), None),
}
ENDLESS = {
    'infinite': (ONE, dict(type='InfiniteSampler', shuffle=True), None),
    'infinite_aspect_ratio': (
        ONE,
        dict(type='InfiniteSampler', shuffle=True),
        dict(type='mmdet.AspectRatioBatchSampler'),
    ),
    'sources': (
        TWO,
        dict(type='mmdet.MultiSourceSampler', batch_size=4, source_ratio=[1, 3]),
        None,
    ),
    'groups': (
        TWO,
        dict(type='mmdet.GroupMultiSourceSampler', batch_size=4, source_ratio=[1, 3]),
        None,
    ),
}
CASES = [(True, name) for name in SAMPLERS] + [(False, name) for name in SAMPLERS | ENDLESS]


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize(('by_epoch', 'name'), CASES)
def test_resumed_with_every_sampler(make_runner, monkeypatch, by_epoch, name, num_workers):
    dataset, sampler, batches = (SAMPLERS | ENDLESS)[name]
    if num_workers and name not in ('default', 'torch', 'infinite', 'groups'):
        pytest.skip('the same as without')
    if num_workers and name == 'groups' and mmengine.__version__ == '0.10.7':
        pytest.skip('workers begin before any hook, and the sampler draws from a global generator')
    if 'mmdet' in str((sampler, batches)):
        pytest.importorskip('mmdet.datasets')  # which registers its samplers
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    loader = dict(
        dataset=dataset,
        batch_size=4,
        sampler=sampler,
        collate_fn=dict(type='default_collate'),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    if batches:
        loader['batch_sampler'] = batches
    settings = dict(hooks=[RADIUS, RESUME], default_scope='mmengine')
    runs = []
    for resumed in (False, True):
        more = {}
        if resumed:
            file = 'epoch_2.pth' if by_epoch else 'iter_7.pth'
            more = dict(load_from=f'{runs[0].work_dir}/{file}', resume=True)
        runs.append(make_runner(by_epoch, train_dataloader=dict(loader), **settings, **more))
        if resumed:  # what another process has drawn by then
            random.random(), np.random.rand(5), torch.rand(3)
        runs[-1].train()
    log = next(Path(runs[0].work_dir).glob('*/*.log')).read_text()
    assert 'SSNResumeHook: ' not in log
    for key, value in runs[0].model.state_dict().items():
        assert torch.equal(runs[1].model.state_dict()[key], value), key


def test_the_frames_of_videos():
    """Their indices are pairs, and a batch sampler looks at the type of the sampler."""
    pytest.importorskip('mmdet')
    from mmdet.datasets.base_video_dataset import BaseVideoDataset
    from mmdet.datasets.samplers import TrackAspectRatioBatchSampler, TrackImgSampler
    from torch.utils.data import DataLoader

    from ssn_plugin.engine.randomness import seed_samples

    class Videos(BaseVideoDataset):
        def __init__(self):
            self.test_mode, self._fully_initialized = False, True

        def __len__(self):
            return 3

        def get_len_per_video(self, index):
            return 2 + index

        def get_data_info(self, index):
            return dict(images=[dict(width=1 + index % 2, height=2 - index % 2)])

        def __getitem__(self, index):
            assert type(index) is tuple
            return index, random.random()

    def items(workers, begin):
        dataset = Videos()
        batches = TrackAspectRatioBatchSampler(TrackImgSampler(dataset, seed=1), 2)
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=workers)
        assert seed_samples(loader, 0)
        assert isinstance(batches.sampler, TrackImgSampler)
        found = []
        for epoch in range(begin, 3):
            batches.sampler.set_epoch(epoch)
            batches.sampler.begin(epoch)
            found.append([item for batch in loader for item in batch])
        return found

    straight = items(0, 0)
    assert len({number for epoch in straight for _, number in epoch}) == 3 * 9
    assert items(2, 1) == straight[1:]


def test_a_sampler_of_ones_own_is_asked_as_before(make_runner):
    """What else it has stays, and so does the object that the loader holds."""
    runner = make_runner(True, hooks=[RADIUS, RESUME])
    runner.train()
    loader = runner.train_dataloader
    assert loader.sampler is loader.batch_sampler.sampler
    assert type(loader.sampler).__name__ == 'DefaultSampler'
    assert len(loader.sampler) == 12
    assert not hasattr(loader.sampler, 'skip')


def test_ranks_draw_other_numbers(monkeypatch):
    from ssn_plugin.engine import randomness

    found = set()
    for rank in range(4):
        monkeypatch.setattr(randomness, 'get_rank', lambda rank=rank: rank)
        randomness.seed_iteration(3, 5)
        found |= {random.random(), float(np.random.rand()), float(torch.rand(()))}
        items = randomness.SeededItems([0], 3)
        items.dataset = NumbersOf()
        index = randomness._placed(0, (1, 2))
        found |= set(items([index])[0])
    assert len(found) == 4 * 6


class NumbersOf:
    def __getitem__(self, index):
        return random.random(), float(np.random.rand()), float(torch.rand(()))
