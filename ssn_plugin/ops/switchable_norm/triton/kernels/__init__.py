"""The kernels of the Triton backend; ../launch.py launches them.

README.md in ops/ says which pass reads and writes what. Throughout:

- A row is one (sample n, channel c) pair; N, C and S count samples, channels and positions.
- x is (N, C, S) in memory where AXIS is 1 and (N, S, C), channels_last, where AXIS is 0: AXIS is
  the axis of the positions in a tile, the other one is that of the rows.
- ALIGN divides S, or C in channels_last; it tells the compiler that vector loads are allowed.
- KINDS holds one nibble per candidate: 0 IN, 1 LN, 2 BN, 3 GN, 15 none or not needed.
- MEAN and VAR are the candidates that the CPU knows to be selected, or -1.
- LN, GN and BATCH say whether statistics of samples, groups and the batch are needed; CONSTANT that
  running statistics stand for those of the batch.
- MERGES says that the pass over x pools what its rows need itself, without the pooling kernel.
- SPLITS is a power of two, at least the number of splits of a row; 1 where there are none.
- SHORT says that a row is one tile; SPREAD that a thread has elements of several rows.
- WIDE says that x has too many elements for 32 bits.
"""

import triton

from ssn_plugin.ops.switchable_norm.triton.kernels.backward import (
    ssn_bwd_dx_kernel,
    ssn_bwd_pool_kernel,
    ssn_bwd_sums_kernel,
)
from ssn_plugin.ops.switchable_norm.triton.kernels.forward import (
    ssn_fwd_apply_kernel,
    ssn_fwd_moments_kernel,
    ssn_fwd_pool_kernel,
)
from ssn_plugin.ops.switchable_norm.triton.kernels.tiles import ssn_probe_kernel

__all__ = [
    'ssn_bwd_dx_kernel',
    'ssn_bwd_pool_kernel',
    'ssn_bwd_sums_kernel',
    'ssn_fwd_apply_kernel',
    'ssn_fwd_moments_kernel',
    'ssn_fwd_pool_kernel',
    'ssn_probe_kernel',
]


def _interpret_with_numpy_2_4() -> None:
    """Let the interpreter of old Triton read numbers, which are arrays of one element to it.

    Triton 3.0 to 3.6 call ``int(array)``, which NumPy refuses from 2.4 on.
    """
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang_tensor

    def prepare_tensors(tensor, *scope) -> None:
        prepare(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = prepare_tensors


if not isinstance(ssn_probe_kernel, triton.JITFunction):
    _interpret_with_numpy_2_4()
