"""Times several functions in interleaved rounds of one process, so that they share its noise."""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Spread(NamedTuple):
    """Median and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def spread(values: list[float]) -> Spread:
    """Median, 20th and 80th percentile.

    Args:
        values: At least one.
    """
    if len(values) == 1:
        return Spread(*values * 3)
    fifths = statistics.quantiles(values, n=5, method='inclusive')
    return Spread(statistics.median(values), fifths[0], fifths[-1])


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time of one call, waiting for the device.

    Args:
        function: What to call.
        device: Where it computes.
    """
    if device.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    steps: dict[str, Callable[[], dict[str, float]]], rounds: int, budget: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """Run every function once per round, in a random order.

    Args:
        steps: Name -> function that measures itself and returns its figures.
        rounds: Rounds to measure, after one to warm up.
        budget: Seconds after which no further round starts; at least 3 are run.

    Yields:
        Name and figures of one call, all names of a round before the next.
    """
    for step in steps.values():
        step()
    names = list(steps)
    order = random.Random(0)
    start = time.perf_counter()
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - start > budget:
            return
        # What ran before leaves caches and the allocator in its state: nobody may always follow
        # the same one.
        order.shuffle(names)
        for name in names:
            yield name, steps[name]()


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes in tensors that were made inside, at any one time.

    Scratch memory inside an ATen kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            StorageWeakRef(value.untyped_storage())
            for value in torch.utils._pytree.tree_flatten((args, kwargs))[0]
            if isinstance(value, Tensor)
        }
        for value in torch.utils._pytree.tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                storage = StorageWeakRef(value.untyped_storage())
                if storage not in given:
                    self._alive[storage] = value.untyped_storage().nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result
