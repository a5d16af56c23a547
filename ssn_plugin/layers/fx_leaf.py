"""Makes a layer a leaf of what torch.fx records, as torch's own layers are."""

from torch import Tensor, nn
from torch.fx import Proxy


def as_leaf(layer: nn.Module, x: Proxy) -> Proxy:
    """Record a call of the layer itself, where torch.fx asks what its forward pass does.

    torch.fx takes layers in the namespace of torch for leaves, and looks into all others, where it
    fails at the first question of a size. What works on recorded layers, such as mmengine's
    ``efficient_conv_bn_eval``, looks for calls of layers.
    """
    return x.tracer.create_proxy('call_module', x.tracer.path_of_module(layer), (x,), {})


def is_symbolic(x: Tensor | Proxy) -> bool:
    """Whether torch.fx is recording."""
    return isinstance(x, Proxy)
