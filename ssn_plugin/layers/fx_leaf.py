"""Makes a layer a leaf of what torch.fx records, as torch's own layers are."""

from torch import Tensor, nn
from torch.fx import Proxy


def as_leaf(layer: nn.Module, x: Proxy) -> Proxy:
    """Record a call of the layer itself, where torch.fx asks what its forward pass does.

    torch.fx records a layer of torch.nn as one call (a leaf), but traces into the forward pass of
    any other layer, and fails there where the code branches on the size of a tensor. Tools that
    rewrite recorded models, such as mmengine's ``efficient_conv_bn_eval``, look for such calls.
    """
    return x.tracer.create_proxy('call_module', x.tracer.path_of_module(layer), (x,), {})


def is_symbolic(x: Tensor | Proxy) -> bool:
    """Whether torch.fx is recording."""
    return isinstance(x, Proxy)
