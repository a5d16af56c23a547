"""The only place that knows that torch differs from version to version; it works from 2.1 on.

Every difference stands below the version that made it needless, and goes when older ones go.
"""

import codecs
import pickle
from _compat_pickle import IMPORT_MAPPING
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import MethodType, SimpleNamespace
from typing import BinaryIO

import torch
from torch.optim import Optimizer

VERSION = tuple(int(number) for number in torch.__version__.split('.')[:2])


# ---- torch 2.3

# Both are constants to torch.compile.
is_compiling = (torch.compiler if VERSION >= (2, 3) else torch._utils).is_compiling

# Operators of the CPU in float16: batch norm, and group norm beside float32 vectors.
CPU_NORMALIZES_HALF = VERSION >= (2, 3)


# ---- torch 2.4

# Custom operators in Python, and Triton 3, which the kernels are written for.
HAS_CUSTOM_OPS = VERSION >= (2, 4)


def before_every_step(optimizer: Optimizer, hook: Callable[[Optimizer, tuple, dict], None]) -> None:
    """Call a hook before every step of an optimizer.

    Before 2.4 the first ``torch.compile`` of anything turns off the hooks of all optimizers, those
    that come later included. There ``step`` itself calls the hook.
    """
    if VERSION >= (2, 4):
        optimizer.register_step_pre_hook(hook)
        return
    step = optimizer.step

    @wraps(step)  # a loss scaler reads its signature
    def step_after_hook(self: Optimizer, *args, **kwargs) -> object:
        hook(self, args, kwargs)
        return step(*args, **kwargs)

    optimizer.step = MethodType(step_after_hook, optimizer)  # schedulers expect a method


# ---- torch 2.6

# torch.export for every size of input, and the ONNX exporter that is built on it.
EXPORTS_EVERY_SIZE = VERSION >= (2, 6)


@contextmanager
def allow_only(objects: Mapping[str, object]) -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` take these under their names, and weights.

    What others have allowed by ``add_safe_globals`` does not count: some allow getattr.

    Before 2.6 torch's unpickler knows too little to read what a training run writes, bytes and sets
    among others. There one of Python's takes its place, which knows what that of 2.6 does.
    """
    if VERSION < (2, 6):
        with _strict_unpickler(objects):
            yield
        return
    before = torch.serialization.get_safe_globals()
    own = [each for each in before if getattr(each, '__module__', '').startswith('torch.')]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*own, *((each, name) for name, each in objects.items())])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@contextmanager
def _strict_unpickler(objects: Mapping[str, object]) -> Iterator[None]:
    allowed = {
        **torch._weights_only_unpickler._get_allowed_globals(),
        **{str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)},
        'torch.device': torch.device,
        '_codecs.encode': codecs.encode,  # bytes
        'collections.Counter': Counter,
        'builtins.set': set,
        'builtins.bytearray': bytearray,
        'builtins.complex': complex,
        **objects,
    }

    class Unpickler(pickle.Unpickler):
        """Knows nothing but what is allowed; that is called, and nothing else."""

        def find_class(self, module: str, name: str) -> object:
            full_name = f'{IMPORT_MAPPING.get(module, module)}.{name}'
            if full_name not in allowed:
                raise pickle.UnpicklingError(f'GLOBAL {full_name} was not allowed')
            return allowed[full_name]

    def load(file: BinaryIO, **options) -> object:
        return Unpickler(file, **options).load()

    before = torch.serialization._weights_only_unpickler
    torch.serialization._weights_only_unpickler = SimpleNamespace(Unpickler=Unpickler, load=load)
    try:
        yield
    finally:
        torch.serialization._weights_only_unpickler = before


# ---- torch 2.13

# Before it torch.compile of a layer gives zero gradients (2.11), ends in an error of its own (2.6),
# or says at length why it cannot (2.1); 2.12 was not tried.
COMPILES_LAYERS = VERSION >= (2, 13)


def beside_the_graph(function: Callable) -> Callable:
    """Keep a function out of what ``torch.compile`` compiles, where that would be wrong."""
    return function if COMPILES_LAYERS else torch.compiler.disable(function)
