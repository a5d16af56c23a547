"""Compile every kernel for GPUs that need not be there; run by test_switchable_norm_triton.py.

Records the launches of a few typical calls, compiles each for two generations of GPUs and prints a
line per kernel. It needs a process of its own, in which Triton compiles instead of interpreting.
"""

import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssn_plugin.ops.switchable_norm.triton import launch as backend

GENERATIONS = (80, 90)
POINTERS = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.int64: '*i64'}


class Recorder:
    """Stands for the kernels: a launch is noted, nothing runs."""

    def __init__(self, kernels):
        self.kernels, self.launches = kernels, []

    def __getattr__(self, name):
        return Launcher(getattr(self.kernels, name), self.launches)


class Launcher:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def call(shape, dtype, last, normalizers, ratio_map, training, selected=(None, None)):
    """Forward and backward on memory that nobody reads."""
    x = torch.empty(shape, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    size, channels = len(normalizers), shape[1]
    index = torch.tensor(0)
    state = (torch.empty(()), index, index, index, index)
    vectors = torch.empty(4, channels)
    _, saved = backend.forward(
        x, *torch.empty(2, size), ratio_map, *state, *vectors, 0.1, training,
        normalizers, 32, 0, 1e-5, selected,
    )  # fmt: skip
    backend.backward(
        x, x, saved, vectors[0], ratio_map, not training, normalizers, 32, 0, 1e-5, selected
    )


def compile_launch(kernel, args, kwargs, generation):
    """The compiled kernel of one launch, specialised as a launch would be."""
    values = dict(zip(kernel.arg_names, args)) | kwargs  # noqa: B905  (the rest are in kwargs)
    warps = values.pop('num_warps')
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = 'i64' if isinstance(value, int) and value >= 2**31 else 'i32'
        if parameter.is_constexpr or value is None:
            kind, constants[(place,)] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            kind = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(place,)] = [['tt.divisibility', 16]]
        elif isinstance(value, float):
            kind = 'fp32'
        signature[parameter.name] = kind
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source, target=GPUTarget('cuda', generation, 32), options={'num_warps': warps}
    )


def stack_bytes(cubin: bytes) -> int:
    """Bytes of registers that did not fit, per thread."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, '--dump-resource-usage', file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return int(found.split('STACK:')[1].split()[0])


def main() -> None:
    recorder = Recorder(backend._kernels())
    backend._kernels = lambda: recorder
    three, four = ('IN', 'LN', 'BN'), ('GN', 'BN', 'LN', 'IN')
    for arguments in (
        ((2, 64, 200, 336), torch.bfloat16, False, three, 'sparsestmax', True),
        ((2, 512, 25, 42), torch.float32, False, three, 'softmax', False),
        ((2, 64, 200, 336), torch.bfloat16, True, four, 'sparsestmax', True),
        ((512, 256, 7, 7), torch.float32, False, four, 'given', True),
        ((2, 64, 200, 336), torch.bfloat16, False, three, 'sparsestmax', False, (2, 2)),
    ):
        call(*arguments)
    for kernel, args, kwargs in recorder.launches:
        for generation in GENERATIONS:
            compiled = compile_launch(kernel, args, kwargs, generation)
            spilled = stack_bytes(compiled.asm['cubin'])
            print(f'{kernel.fn.__name__} sm_{generation}: {spilled} bytes spilled', flush=True)


if __name__ == '__main__':
    main()
