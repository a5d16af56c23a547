"""Launches of kernels, by the shortest way there is once they are compiled.

Triton's own call, ``kernel[grid](...)``, takes several times as long to find a compiled kernel as
to launch it. But it returns what it found, which is kept here and launched itself from then on.
"""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from operator import itemgetter, or_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CAPTURE = (
    'SSN and SN compile a kernel when they meet a kind of input first, which a CUDA graph cannot '
    'capture: got such an input during a capture, expected a forward and backward pass on it '
    'before, as torch.cuda.graphs.make_graphed_callables does'
)


@lru_cache
def kernels() -> ModuleType:
    """The kernels; imported when they are first needed, and Triton with them."""
    from ssn_plugin.ops.switchable_norm.triton import kernels

    return kernels


_NO_HOOKS = (None, None, None)  # what they are told, before and after; see _is_watched


class Launch:
    """One launch of a pass: all of it that is known before there is a tensor.

    Attributes:
        name: Of the kernel.
        numbers: Its arguments behind those that are tensors; their types are settled by them.
        constants: Its compile-time arguments.
    """

    def __init__(
        self,
        name: str,
        programs: int,
        places: tuple[int, ...],
        numbers: tuple[float, ...],
        warps: int,
        **constants,
    ) -> None:
        self.name, self.numbers, self.constants = name, numbers, constants
        self._programs, self._warps = programs, warps
        self.pick = itemgetter(*places)
        self.compiled: dict[tuple, tuple] = {}

    def arguments(self, values: Sequence) -> tuple[tuple, dict]:
        """Positional and named arguments of the ordinary call, out of all values of the pass."""
        named = {'num_warps': self._warps, **self.constants}
        return (*self.pick(values), *self.numbers), named

    def ordinary(self, values: Sequence) -> Any:
        """Launch by Triton's own call, and return what that returns: the compiled kernel."""
        positional, named = self.arguments(values)
        try:
            return getattr(kernels(), self.name)[(self._programs,)](*positional, **named)
        except Exception as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(CAPTURE) from error
            raise

    def compile(self, values: Sequence, kinds: tuple) -> None:
        """Launch by the ordinary call, and keep what it compiled or found for the next time."""
        compiled, kernel = self.ordinary(values), getattr(kernels(), self.name)
        if compiled is None:
            return
        rest = self.numbers
        if _triton_version() >= (3, 3):
            names = kernel.arg_names[-len(self.constants) :]
            rest += tuple(self.constants[name] for name in names)
        grid = (self._programs, 1, 1)
        settled = compiled.function, compiled.packed_metadata, *_NO_HOOKS
        start, settled, packs = innermost(compiled.run, settled, len(self.pick(values)), rest)
        hooks = kernel.pre_run_hooks  # a list; whoever adds one wants to see the arguments
        # The last keeps the function loaded.
        self.compiled[kinds] = start, grid, settled, self.pick, rest, packs, hooks, compiled


def innermost(
    launcher: Callable, settled: tuple, addresses: int, rest: tuple
) -> tuple[Callable, tuple, bool]:
    """What Triton's launcher calls in the end, what that gets behind grid and stream, and how.

    The launcher makes room for kernels that need memory of their own, which ours do not, and takes
    twice as long as the launch itself. What it passes on is the same each time: it is noted once.

    Args:
        launcher: Of the compiled kernel.
        settled: What it gets between the stream and the arguments of the kernel.
        addresses: How many of those are addresses.
        rest: Those behind them.

    Returns:
        The function; its arguments between the stream and those of the kernel; whether it takes
        the latter as one tuple. The launcher itself where it does anything else.
    """
    noted, stream, given = [], object(), (*range(16, 16 + addresses), *rest)
    try:
        needs_memory = launcher.global_scratch_size or launcher.profile_scratch_size
        noting = copy.copy(launcher)
        noting.launch = lambda *passed: noted.append(passed)
        if not needs_memory:
            noting(1, 1, 1, stream, *settled, *given)
    except Exception:  # a launcher of another kind
        noted.clear()
    for passed in noted:
        if passed[:4] == (1, 1, 1, stream) and passed[-1] == given:
            return launcher.launch, passed[4:-1], True
        if passed[:4] == (1, 1, 1, stream) and passed[-len(given) :] == given:
            return launcher.launch, passed[4 : -len(given)], False
    return launcher, settled, False


def run(
    launches: Sequence[Launch], tensors: tuple[Tensor | None, ...], number: float, kinds: tuple
) -> None:
    """Launch kernels on the current stream of a device.

    Args:
        launches: In this order.
        tensors: All that the kernels get of them; the places of a launch count these, and
            ``number`` behind them.
        number: The one argument that is no tensor and may change from call to call.
        kinds: The device, -1 for the CPU, then all that tells compiled kernels of one launch apart:
            the dtypes of tensors. Which are None, and all integers, is settled by the launches.
    """
    device = kinds[0]
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(launches, tensors, number, kinds)
        return
    if not _is_direct() or _is_watched():
        for launch in launches:
            launch.ordinary((*tensors, number))
        return
    # To a compiled kernel an address is an integer, and it relies on those that 16 divides.
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if reduce(or_, filter(None, addresses)) & 15:
        kinds += tuple(bool(address and address & 15) for address in addresses)
    addresses.append(number)
    stream = _triton().runtime.driver.active.get_current_stream(device)
    for launch in launches:
        found = launch.compiled.get(kinds)
        if found is None or found[-2]:
            launch.compile((*tensors, number), kinds)
        else:
            start, grid, settled, pick, rest, packs, *_ = found
            if packs:
                start(*grid, stream, *settled, (*pick(addresses), *rest))
            else:
                start(*grid, stream, *settled, *pick(addresses), *rest)


@lru_cache
def _triton() -> ModuleType:
    import triton

    return triton


def _triton_version() -> tuple[int, int]:
    major, minor, *_ = _triton().__version__.split('.')
    return int(major), int(minor)


def _is_known() -> bool:
    """Whether it is known how the installed Triton launches: the versions were read one by one."""
    return (3, 0) <= _triton_version() <= (3, 9)


@lru_cache
def _is_direct() -> bool:
    """Whether compiled kernels are launched directly.

    The interpreter compiles none. AMD's GPUs get the ordinary call: there more than alignment tells
    tensors apart.
    """
    if not _is_known() or not isinstance(kernels().ssn_probe_kernel, _triton().JITFunction):
        return False
    return _triton().runtime.driver.active.get_current_target().backend == 'cuda'


def _is_watched() -> bool:
    """Whether a profiler or debugger follows what Triton compiles and launches."""
    knobs = getattr(_triton(), 'knobs', None)
    if knobs is None:  # before 3.4
        owner = _triton().compiler.CompiledKernel
        return bool(owner.launch_enter_hook or owner.launch_exit_hook)
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, 'calls', enter)
        or getattr(leave, 'calls', leave)
        or runtime.debug
        or getattr(runtime, 'add_stages_inspection_hook', None)
        or getattr(knobs.compilation, 'instrumentation_mode', None)
    )
