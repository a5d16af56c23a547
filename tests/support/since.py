"""A mark for tests of what older versions of torch lack."""

import pytest
import torch

from ssn_plugin.torch_versions import HAS_CUSTOM_OPS, VERSION


def since(major: int, minor: int, what: str) -> pytest.MarkDecorator:
    """Skip a test where torch is older than the first version with ``what``."""
    return pytest.mark.skipif(
        (major, minor) > VERSION, reason=f'{what}: torch {major}.{minor} or newer'
    )


def require_kernels() -> tuple[int, int]:
    """Skip where the Triton kernels cannot run, else tell the version of Triton.

    Where there is no GPU the kernels are interpreted.
    """
    triton = pytest.importorskip('triton')
    if not HAS_CUSTOM_OPS:
        pytest.skip('the kernels: torch 2.4 or newer', allow_module_level=True)
    version = tuple(int(part) for part in triton.__version__.split('.')[:2])
    if version < (3, 4) and not torch.cuda.is_available():
        pytest.skip('Triton before 3.4 interprets no booleans', allow_module_level=True)
    return version


ONE_GRAPH = since(2, 13, 'torch.compile of the layers into one graph')
EXPORT = since(2, 6, 'torch.export for every size')
AUTOCAST_DTYPES = (
    pytest.param(
        torch.float16, marks=since(2, 3, 'autocast to float16 on the CPU'), id='torch.float16'
    ),
    pytest.param(torch.bfloat16, id='torch.bfloat16'),
)
# Of torch.onnx.export: the exporter that mmdeploy uses, the only one before there was this choice.
TORCHSCRIPT = dict(dynamo=False) if VERSION >= (2, 5) else {}
