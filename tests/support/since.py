"""A mark for tests of what older versions of torch lack."""

import pytest
import torch

from ssn_plugin.torch_versions import VERSION


def since(major: int, minor: int, what: str) -> pytest.MarkDecorator:
    """Skip a test where torch is older than the first version with ``what``."""
    return pytest.mark.skipif(
        (major, minor) > VERSION, reason=f'{what}: torch {major}.{minor} or newer'
    )


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
