"""SSNResumeHook: random numbers by place; tests/test_interruption.py kills runs that use it."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ssn_plugin.engine.randomness import seed_iteration, seed_samples


def draws() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Draws(Dataset):
    """A data set of nothing but random numbers."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        assert type(index) is int
        return index, *draws()

    def get_data_info(self, index):
        return dict(width=1 + index % 2, height=2 - index % 2)


def loader_of(sampler=DefaultSampler, seed=5, run_seed=0, batch_size=2, **settings) -> DataLoader:
    dataset = Draws()
    loader = DataLoader(
        dataset, batch_size, sampler=sampler(dataset, seed=seed), collate_fn=list, **settings
    )
    assert seed_samples(loader, run_seed)
    return loader


def first(loader, batches: int) -> list:
    iterator = iter(loader)
    return [item for _ in range(batches) for item in next(iterator)]


def begin(loader, epoch: int) -> None:
    loader.sampler.set_epoch(epoch)  # as mmengine does
    loader.sampler.begin(epoch)


def test_iterations_have_numbers_of_their_own():
    found = set()
    for seed in (0, 1):
        for iteration in range(50):
            seed_iteration(seed, iteration)
            numbers = draws()
            seed_iteration(seed, iteration)
            assert draws() == numbers
            found |= set(numbers)
    assert len(found) == 2 * 50 * 3


def test_samples_have_numbers_of_their_own_in_every_epoch_and_process():
    loader = loader_of()
    epochs = []
    for epoch in range(3):
        begin(loader, epoch)
        epochs += first(loader, 5)
    assert sorted(index for index, *_ in epochs) == sorted([*range(10)] * 3)
    assert len({number for _, *numbers in epochs for number in numbers}) == 3 * 10 * 3
    seed_iteration(0, 0)
    assert not {*draws()} & {number for _, *numbers in epochs for number in numbers}

    other = loader_of(num_workers=2, persistent_workers=True)
    again = []
    for epoch in range(3):
        begin(other, epoch)
        again += first(other, 5)
    assert again == epochs
    assert first(loader_of(run_seed=1), 5) != epochs[:10]


def test_loading_leaves_the_generators_alone():
    seed_iteration(0, 0)
    before = draws()
    seed_iteration(0, 0)
    loader_of().dataset.__getitems__([1, 2, 3])
    assert draws() == before


@pytest.mark.skipif(
    not hasattr(InfiniteSampler, 'skip'), reason='the original mmengine loads what it skips'
)
@pytest.mark.parametrize('num_workers', [0, 2])
def test_skipping_goes_to_the_place(num_workers):
    straight = first(loader_of(InfiniteSampler), 12)
    loader = loader_of(InfiniteSampler, num_workers=num_workers)
    loader.sampler.skip(14)  # as mmengine does: by the sampler that the loader knows
    assert first(loader, 5) == straight[14:]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_loader_that_had_begun_before(num_workers):
    """The original mmengine begins when it builds the loop, before the hook sees the loader."""
    straight = first(loader_of(InfiniteSampler), 12)
    dataset = Draws()
    loader = DataLoader(
        dataset,
        2,
        sampler=InfiniteSampler(dataset, seed=5),
        collate_fn=list,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    next(iter(loader))
    assert seed_samples(loader, 0)
    loader.sampler.begin(0)
    assert first(loader, 12) == straight


def test_indices_of_another_kind_of_batches():
    """mmdet's, which collects images of like shape; and what else the sampler has is there."""
    pytest.importorskip('mmdet')
    from mmdet.datasets.samplers import AspectRatioBatchSampler

    dataset = Draws()
    batches = AspectRatioBatchSampler(DefaultSampler(dataset, seed=3), 2)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=list)
    assert seed_samples(loader, 0)
    sampler = loader.batch_sampler.sampler
    sampler.begin(1)
    sampler.set_epoch(1)
    assert sampler.epoch == 1
    assert isinstance(sampler, DefaultSampler)
    found = [item for batch in loader for item in batch]
    assert len(loader.batch_sampler.sampler) == len(found) == 10
    assert len({number for _, *numbers in found for number in numbers}) == 30


def test_seeding_twice_is_once():
    loader = loader_of()
    once = first(loader, 5)
    assert seed_samples(loader, 0)
    begin(loader, 0)
    assert first(loader, 5) == once
    assert type(loader.sampler).__mro__[1] is DefaultSampler


def test_data_sets_go_to_processes_that_are_spawned():
    dataset = loader_of().dataset
    assert pickle.loads(pickle.dumps(dataset)).__getitems__.dataset.__class__ is Draws


def test_loaders_without_places():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    for loader in (
        DataLoader(Stream(), 2),
        DataLoader(Draws(), batch_size=None),
        DataLoader(Draws(), batch_sampler=[[0, 1], [2, 3]]),
        DataLoader([1, 2, 3], 2),
    ):
        assert not seed_samples(loader, 0)
        assert len(list(loader)) > 0


RESUME = dict(type='SSNResumeHook')
RADIUS = dict(type='SSNRadiusHook')


def test_data_without_a_sampler_are_said(make_runner):
    class Stream(IterableDataset):
        def __len__(self):
            return 12

        def __iter__(self):
            return map(DATASETS.build(dict(type='ToyImages')).__getitem__, range(12))

    runner = make_runner(hooks=[RADIUS, RESUME], train_dataloader=DataLoader(Stream(), 3))
    runner.train()
    log = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    assert log.count('got a Stream that is not drawn by the indices of a sampler') == 1


@pytest.mark.parametrize('by_epoch', [False, True], ids=['iter', 'epoch'])
def test_a_seed_that_was_drawn_comes_back_with_the_order_of_the_data(make_runner, by_epoch):
    name = 'epoch_1.pth' if by_epoch else 'iter_5.pth'
    straight = make_runner(by_epoch, hooks=[RADIUS, RESUME], randomness=dict(seed=None))
    straight.train()
    for hooks, equal in (([RADIUS, RESUME], True), ([RADIUS], False)):
        resumed = make_runner(
            by_epoch,
            hooks=hooks,
            randomness=dict(seed=None),
            load_from=f'{straight.work_dir}/{name}',
            resume=True,
        )
        assert resumed.seed != straight.seed
        resumed.train()
        states = resumed.model.state_dict(), straight.model.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1]) == equal


def test_a_sampler_with_a_seed_of_its_own_keeps_it(make_runner):
    sampler = dict(type='InfiniteSampler', shuffle=True, seed=77)
    loader = dict(
        dataset=dict(type='ToyImages'),
        batch_size=3,
        sampler=sampler,
        collate_fn=dict(type='default_collate'),
    )
    runner = make_runner(hooks=[RADIUS, RESUME], train_dataloader=loader)
    runner.train()
    assert runner.train_dataloader.sampler.seed == 77
    assert runner.seed != 77


def test_every_other_hook_draws_after_it(make_runner):
    """What a hook of high priority draws is that of the iteration, in a resumed run too."""

    class Drawing(Hook):
        priority = 'HIGH'

        def __init__(self):
            self.drawn = {}

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.drawn[runner.iter] = draws()

    runs = []
    for more in ({}, dict(resume=True)):
        if more:
            more['load_from'] = f'{runs[0].work_dir}/iter_5.pth'
        runs.append(make_runner(hooks=[RADIUS, RESUME], **more))
        runs[-1].register_hook(drawing := Drawing())
        runs[-1].drawing = drawing
        draws()  # a resumed process has drawn other numbers by then
        runs[-1].train()
    straight, resumed = (run.drawing.drawn for run in runs)
    assert len(set(straight.values())) == 12
    assert resumed == {iteration: straight[iteration] for iteration in range(5, 12)}
