"""What a layer costs the CPU on a GPU, beside BatchNorm2d, with launches that run nothing.

python benchmarks/host_cost.py

Inputs are tiny and on the CPU. The kernels of the undecided layer are compiled and launched by
Triton, whose driver stands on a CUDA library that does nothing: what is measured is Python, torch
and Triton's launcher. It needs a C compiler and no GPU.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ssn_plugin import SSN, set_radius

# All that Triton's driver asks of CUDA, with answers that it believes.
CUDA = r"""
#define NOTHING(name) int name() { return 0; }
int launched = 0;
int cuLaunchKernelEx() { launched++; return 0; }
int cuCtxGetCurrent(void **p) { *p = (void *)1; return 0; }
int cuDevicePrimaryCtxRetain(void **p) { *p = (void *)1; return 0; }
int cuModuleLoadData(void **p) { *p = (void *)1; return 0; }
int cuModuleGetFunction(void **p) { *p = (void *)1; return 0; }
int cuCtxGetDevice(int *p) { *p = 0; return 0; }
int cuDeviceGet(int *p, int device) { *p = device; return 0; }
int cuDeviceGetAttribute(int *p) { *p = 227 * 1024; return 0; }
int cuFuncGetAttribute(int *p) { *p = 1024; return 0; }
int cuDriverGetVersion(int *p) { *p = 13000; return 0; }
int cuGetErrorString(int error, const char **p) { *p = "no CUDA"; return 0; }
int cuPointerGetAttribute(unsigned long long *p, int name, unsigned long long address) {
    *p = address;
    return 0;
}
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuModuleUnload)
NOTHING(cuStreamIsCapturing) NOTHING(cuOccupancyMaxActiveClusters) NOTHING(cuPointerGetAttributes)
NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col)
"""


def with_stub(rounds: int) -> int:
    """Run this script with the CUDA library that does nothing in the place of any other.

    A process of its own, since torch loads the library of a machine that has one.

    Args:
        rounds: Of the measurement.

    Returns:
        The exit code.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, 'cuda.c'), Path(folder, 'libcuda.so.1')
        source.write_text(CUDA)
        command = ['cc', '-shared', '-fPIC', '-O2', '-Wl,-soname,libcuda.so.1', '-o']
        subprocess.run([*command, library, source], check=True)
        Path(folder, 'libcuda.so').symlink_to(library)
        settings = {
            'LD_PRELOAD': str(library),
            'TRITON_LIBCUDA_PATH': folder,
            'TRITON_INTERPRET': '0',
            'SSN_BACKEND': 'triton',
        }
        command = [sys.executable, __file__, '--rounds', str(rounds), '--stub', library]
        return subprocess.run(command, env={**os.environ, **settings}, check=False).returncode


def stub_cuda(library: str) -> ctypes.c_int:
    """Put Triton on a CUDA library that does nothing; returns how often it was told to launch.

    Args:
        library: Its path; it is loaded.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        """Without what asks torch for a device."""

        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget('cuda', 90, 32)

    triton.runtime.driver.set_active(Driver())
    return ctypes.c_int.in_dll(ctypes.CDLL(library), 'launched')


def step_seconds(layer: nn.Module, x: Tensor, dy: Tensor, steps: int) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass, the mean of some steps.

    Args:
        layer: The layer.
        x: Its input, a leaf.
        dy: Upstream gradient.
        steps: How many.
    """
    leaves = [x, *layer.parameters()]
    forward = backward = 0.0
    for _ in range(steps):
        for leaf in leaves:
            leaf.grad = None
        start = time.perf_counter()
        y = layer(x)
        between = time.perf_counter()
        y.backward(dy)
        forward += between - start
        backward += time.perf_counter() - between
    return forward / steps, backward / steps


def radius_seconds(layers: int, rounds: int) -> float:
    """Seconds of one set_radius over a model of undecided layers, the median.

    Args:
        layers: How many.
        rounds: How often.
    """
    model = nn.Sequential(*(SSN(4) for _ in range(layers)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    taken = []
    for index in range(rounds):
        start = time.perf_counter()
        set_radius(model, 0.3 + 0.01 * (index % 2))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=1000, help='rounds of 4 steps')
    parser.add_argument('--stub', help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if args.stub is None:
            sys.exit(with_stub(args.rounds))
        launched = stub_cuda(args.stub)
        x, dy = torch.randn(2, 2, 64, 4, 4)
        x.requires_grad_()
        found = {'BatchNorm2d': nn.BatchNorm2d(64), 'SSN': SSN(64, radius=0.3)}
        for layer in found.values():
            step_seconds(layer, x, dy, 3)  # compiles
        before = launched.value
        step_seconds(found['SSN'], x, dy, 1)
        launches = launched.value - before
        times = {name: [] for name in found}
        for _ in range(args.rounds):
            for name, layer in found.items():
                times[name].append(step_seconds(layer, x, dy, 4))
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f'host_cost.py: {error}: it needs Triton and a C compiler')
    total = {}
    for name, pairs in times.items():
        # The least of all rounds: what else runs on the machine only adds.
        forward, backward = map(min, zip(*pairs, strict=True))
        total[name] = forward + backward
        print(f'{name}: forward {1e6 * forward:.1f} us, backward {1e6 * backward:.1f} us')
    print(f'launches of the SSN, forward and backward: {launches}')
    taken = radius_seconds(69, max(args.rounds // 10, 3))
    print(f'set_radius over 69 layers on the CPU: {1e3 * taken:.2f} ms')
    print(f'host cost: {total["SSN"] / total["BatchNorm2d"]:.2f} x BatchNorm2d')


if __name__ == '__main__':
    main()
