"""Runs the tests that a figure presupposes: no number for a layer that computes something else."""

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TESTS = ['tests/test_ops/test_switchable_norm.py', 'tests/test_ops/test_sparsestmax.py']
CUDA_TESTS = ['tests/test_ops/test_gpu.py']


def require_parity(device: torch.device) -> None:
    """Leave with exit code 1 if the operators do not equal their references.

    Args:
        device: On CUDA its own tests run too.
    """
    tests = TESTS + (CUDA_TESTS if device.type == 'cuda' else [])
    print(f'parity tests: {" ".join(tests)}', flush=True)
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-m', 'not slow', *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:])
    if done.returncode != 0:
        sys.exit('the parity tests failed, so nothing was measured')
