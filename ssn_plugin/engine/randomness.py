"""Random numbers as a function of the place in the training, so that a resumed run draws the same.

Python's, numpy's and torch's global generators are seeded anew for every iteration and for every
sample that is loaded, in whatever process. Nothing of their state has to be in a checkpoint.
"""

import contextlib
import functools
import random
from collections.abc import Iterator
from itertools import count, islice

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import get_rank
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

# Every seed includes what it is for, so that an iteration, a sample and an order with the same
# numbers do not get the same random numbers.
_ITERATION, _SAMPLE, _ORDER = range(3)


def _seed(*place: int) -> int:
    words = np.random.SeedSequence(place).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    return int.from_bytes(words[:2].tobytes(), 'little') >> 1  # torch wants 63 bits


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave the generators of the CPU as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_iteration(seed: int, iteration: int) -> None:
    """Seed all generators of this process, those of GPUs too, for an iteration of the whole run."""
    torch.manual_seed(_seed(seed, _ITERATION, get_rank(), iteration))


class _PlacedNumber(int):
    """An index with the place at which it is used: pass over the data and number within it."""

    place: tuple[int, int]


class _PlacedTuple(tuple):
    """The same where an index is a pair, as of a video and its frame."""

    place: tuple[int, int]


def _placed(index: object, place: tuple[int, int]) -> object:
    if isinstance(index, tuple):
        placed = _PlacedTuple(index)
    elif hasattr(index, '__index__'):
        placed = _PlacedNumber(index)
    else:
        return index
    placed.place = place
    return placed


@functools.cache
def _placing(kind: type[Sampler]) -> type[Sampler]:
    """A kind of sampler whose indices carry their place and whose order follows from a seed."""
    # mmengine's samplers have generators of their own, which they seed anew for every pass.
    draws_alone = issubclass(kind, DefaultSampler | InfiniteSampler)

    class Placing(kind):
        run_seed = 0
        run_pass = run_next = 0
        run_begun = False

        def __iter__(self) -> Iterator:
            own_pass, indices = self.run_pass, None
            if issubclass(kind, InfiniteSampler):
                # It keeps one generator, which ends when an iteration over it is broken off.
                self.indices = islice(self._indices_of_rank(), self.run_next, None)
            for number in count(self.run_next):
                with self._seeded(own_pass, number):
                    # Some samplers draw all random numbers when the iteration begins.
                    indices = super().__iter__() if indices is None else indices
                    index = next(indices, None)
                if index is None:
                    self.run_pass, self.run_next = own_pass + 1, 0
                    return
                # An infinite sampler goes on here when it is iterated again.
                self.run_next = number + 1
                yield _placed(index, (own_pass, number))

        def begin(self, number: int) -> None:
            """Make the next pass that of a number, as if those before had been."""
            if not self.run_begun and not draws_alone and hasattr(self, '__len__'):
                set_epoch = getattr(self, 'set_epoch', lambda epoch: None)
                for self.run_pass in range(number):
                    set_epoch(self.run_pass)
                    self.run_next = 0
                    for _ in islice(self, len(self)):
                        pass
                set_epoch(number)
            self.run_begun = True
            self.run_pass, self.run_next = number, 0

        @contextlib.contextmanager
        def _seeded(self, *place: int) -> Iterator[None]:
            if draws_alone:
                yield
                return
            with preserved_generators():
                # Every process needs the same numbers, because each takes its share of one order.
                torch.default_generator.manual_seed(_seed(self.run_seed, _ORDER, *place))
                yield

    if hasattr(kind, 'skip'):

        def skip(self, num_samples: int) -> None:
            # mmengine calls it to skip what was trained on.
            kind.skip(self, num_samples)
            self.run_next = num_samples

        Placing.skip = skip
    Placing.__name__, Placing.__qualname__ = kind.__name__, kind.__qualname__
    return Placing


def place_indices(sampler: Sampler, seed: int) -> None:
    """Make every index of a sampler carry its place, and its order a function of the seed.

    The sampler stays the object that it is, of a class derived from its own: loaders and batch
    samplers hold it, look at its type and at what else it has.
    """
    if not hasattr(sampler, 'run_begun'):
        sampler.__class__ = _placing(type(sampler))
    sampler.run_seed = seed


class SeededItems:
    """Loads samples, each with generators seeded for its place, and leaves these as they were."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = (seed, _SAMPLE, get_rank())

    def __call__(self, indices: list[int]) -> list:
        """Load."""
        with preserved_generators():
            return [self._load(index) for index in indices]

    def _load(self, index: int | tuple):
        if isinstance(index, _PlacedNumber | _PlacedTuple):
            # Only the CPU's generator: a worker process must not touch a GPU.
            torch.default_generator.manual_seed(_seed(*self.seed, *index.place))
            index = tuple(index) if isinstance(index, tuple) else int(index)
        return self.dataset[index]


def seed_samples(loader: DataLoader, seed: int) -> bool:
    """Make every sample that a loader loads a function of the seed, its index and its place.

    Returns:
        Whether it could be done: its batches have to be made of the indices of a sampler.
    """
    sampler = getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)
    if not isinstance(sampler, Sampler) or isinstance(loader.dataset, IterableDataset):
        return False
    try:
        # A DataLoader calls this method, where there is one, to load a whole batch.
        loader.dataset.__getitems__ = SeededItems(loader.dataset, seed)
    except AttributeError:  # a list takes no new attributes
        return False
    place_indices(sampler, seed)
    # Persistent workers have a copy of the data set from before; make the loader start new ones.
    loader._iterator = None
    return True
