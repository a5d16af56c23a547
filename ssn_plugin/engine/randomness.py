"""Random numbers as a function of the place in the training, so that a resumed run draws the same.

Python's, numpy's and torch's global generators are seeded anew for every iteration and for every
sample that is loaded, in whatever process. Nothing of their state has to be in a checkpoint.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import get_rank
from torch.utils.data import DataLoader, Dataset, Sampler

# Two kinds of places, that no two of them share their numbers.
_ITERATION, _SAMPLE = range(2)


def _seed(*place: int) -> int:
    words = np.random.SeedSequence(place).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    return int.from_bytes(words[:2].tobytes(), 'little') >> 1  # torch wants 63 bits


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave the generators of the host as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_iteration(seed: int, iteration: int) -> None:
    """Seed all generators, those of GPUs too, for an iteration of this process.

    Args:
        seed: That of the run.
        iteration: Counted over the whole run.
    """
    torch.manual_seed(_seed(seed, _ITERATION, get_rank(), iteration))


class _Placed(int):
    """An index with the place at which it is used: epoch and number within it."""

    place: tuple[int, int]


class PlacedSampler(Sampler):
    """The indices of a sampler, each with its place.

    Args:
        sampler: One of mmengine; what else it has is found here too.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._next = 0
        if hasattr(sampler, 'skip'):
            # mmengine calls it on the sampler that the loader knows, to skip what was trained on.
            self._skip, sampler.skip = sampler.skip, self.skip

    def skip(self, num_samples: int) -> None:
        """As that of the sampler."""
        self._skip(num_samples)
        self._next = num_samples

    def __iter__(self) -> Iterator[int]:
        epoch = getattr(self.sampler, 'epoch', None)
        if epoch is not None:  # others go on for ever
            self._next = 0
        for index in self.sampler:
            placed = _Placed(index)
            placed.place = (epoch or 0, self._next)
            self._next += 1
            yield placed

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str):
        if name == 'sampler':  # not yet there while it is copied
            raise AttributeError(name)
        return getattr(self.sampler, name)


class SeededItems:
    """Loads samples, each with generators seeded for its place, and leaves these as they were."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = (seed, _SAMPLE, get_rank())

    def __call__(self, indices: list[int]) -> list:
        """Load."""
        with preserved_generators():
            return [self._load(index) for index in indices]

    def _load(self, index: int):
        if isinstance(index, _Placed):
            # Without those of GPUs, which a worker process must not touch.
            torch.default_generator.manual_seed(_seed(*self.seed, *index.place))
            index = int(index)
        return self.dataset[index]


def seed_samples(loader: DataLoader, seed: int) -> bool:
    """Make every sample that a loader loads a function of the seed, its index and its place.

    Returns:
        Whether it could be done: its sampler has to be one of mmengine.
    """
    batches = getattr(loader, 'batch_sampler', None)
    sampler = getattr(batches, 'sampler', None)
    if not isinstance(sampler, DefaultSampler | InfiniteSampler | PlacedSampler):
        return False
    if not isinstance(sampler, PlacedSampler):
        batches.sampler = PlacedSampler(sampler)
    # Where a loader looks for a way to load a whole batch.
    loader.dataset.__getitems__ = SeededItems(loader.dataset, seed)
    return True
