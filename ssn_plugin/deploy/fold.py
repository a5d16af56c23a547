"""Folds BatchNorm into the convolution before it, found by where the data goes."""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


def find_foldable(model: nn.Module, run: Callable[[nn.Module], object]) -> list[tuple[str, str]]:
    """Pairs of a convolution and a BatchNorm that one convolution can replace exactly.

    The model is run once, and every operator's inputs are looked at. A pair is one where each
    output of the convolution goes into that BatchNorm and nowhere else, and each input of the
    BatchNorm comes from that convolution, however often both are called; where the convolution is
    the plain operator with its own weight and bias, and the BatchNorm the plain operator with its
    running statistics. So a convolution that several BatchNorms share is in no pair, nor a
    BatchNorm that follows two convolutions, nor one whose input a shortcut takes too. The order in
    which modules were registered does not matter.

    What is not called in the run is not found. An output that is read neither by an operator of
    torch nor by a module without children, but by compiled code alone, goes unnoticed.

    Args:
        model: In evaluation mode; it is not changed.
        run: Passes real inputs through the model that it is given. It is called without gradients,
            and should return the model's outputs, so that what they hold counts as used.

    Returns:
        Names of convolution and BatchNorm, as in ``model.named_modules()``, in its order.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ssn_plugin import find_foldable
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> find_foldable(model, lambda model: model(torch.randn(2, 3, 8, 8)))
        [('0', '1')]
    """
    flow = _Flow(model)
    try:
        with torch.no_grad(), flow:
            outputs = run(model)
    finally:
        flow.remove_hooks()
    flow.exclude_alive()
    del outputs  # until here the tensors had to live, so that no storage was reused
    return flow.pairs()


def fold_batch_norms(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> nn.Module:
    r"""Fold BatchNorms into the convolutions before them, for evaluation.

    .. math::
        \mathrm{weight}' = \mathrm{weight} \cdot s, \qquad
        \mathrm{bias}' = (\mathrm{bias} - \mathrm{running\_mean}) \cdot s + \beta

    with

    .. math::
        s = \frac{\gamma}{\sqrt{\mathrm{running\_var} + \epsilon}}

    Each BatchNorm becomes an ``nn.Identity``, in every place where it stands, so that code which
    looks it up by name goes on. The convolution stays the same module, with new parameters of the
    same dtype and device; those that it had keep their ``requires_grad``, a new bias takes that of
    the BatchNorm's. Outputs in evaluation stay the same up to rounding; training is another matter,
    as there is no BatchNorm any more.

    Args:
        model: Any module; changed in place.
        pairs: Names of convolution and BatchNorm, as of :func:`find_foldable`. That they follow one
            another is not checked here.

    Returns:
        The model.

    Raises:
        ValueError: If a name is not that of a convolution or of a BatchNorm with running
            statistics, the numbers of channels differ, or one is named twice. Nothing was changed
            then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ssn_plugin import fold_batch_norms
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
        >>> fold_batch_norms(model, [('0', '1')])
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    folded = _checked(model, pairs)
    for norm, conv in folded.items():
        weight, bias = _folded_parameters(conv, norm)
        old = norm.bias if conv.bias is None else conv.bias
        learned = conv.weight.requires_grad if old is None else old.requires_grad
        conv.weight = nn.Parameter(weight, conv.weight.requires_grad)
        conv.bias = nn.Parameter(bias, learned)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in folded:
                parent._modules[name] = nn.Identity().train(child.training)
    return model


def _checked(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> dict[_BatchNorm, _ConvNd]:
    """BatchNorm -> convolution."""
    layers = dict(model.named_modules(remove_duplicate=False))
    folded = {}
    for conv_name, norm_name in pairs:
        conv, norm = layers.get(conv_name), layers.get(norm_name)
        for name, layer, kind, expected in (
            (conv_name, conv, _ConvNd, 'a convolution'),
            (norm_name, norm, _BatchNorm, 'a BatchNorm with running statistics'),
        ):
            if not isinstance(layer, kind) or getattr(layer, 'running_var', layer) is None:
                found = 'nothing' if layer is None else f'a {type(layer).__name__}'
                if isinstance(layer, kind):
                    found += ' without them'
                raise ValueError(
                    f'pairs: got {found} named {name!r} in the model, expected {expected}'
                )
        if conv.out_channels != norm.num_features:
            raise ValueError(
                f'pairs: got {conv.out_channels} channels of {conv_name!r} and '
                f'{norm.num_features} of {norm_name!r}, expected the same number'
            )
        if conv in folded.values() or norm in folded:
            raise ValueError(
                f'pairs: got {(conv_name, norm_name)} after another pair with one of them, '
                'expected every layer once'
            )
        folded[norm] = conv
    return folded


@torch.no_grad()
def _folded_parameters(conv: _ConvNd, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    # In float64, to round only once, and on the CPU, because MPS has no float64.
    # Torch's fuse_conv_bn_weights is not used, because it rounds several times, and scales the
    # wrong channels of a transposed convolution with groups.
    def exact(tensor: Tensor) -> Tensor:
        return (tensor if tensor.is_meta else tensor.cpu()).double()

    scale = (exact(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * exact(norm.weight)
    shift = -exact(norm.running_mean) * scale
    if conv.bias is not None:
        shift = shift + exact(conv.bias) * scale
    if norm.bias is not None:
        shift = shift + exact(norm.bias)
    weight = conv.weight
    if isinstance(conv, _ConvTransposeNd):  # (in, out / groups, ...), the inputs group by group
        per_input = scale.view(conv.groups, 1, -1).expand(-1, len(weight) // conv.groups, -1)
        scale = per_input.reshape(weight.shape[:2])
    scale = scale.view(*scale.shape, *(1,) * (weight.dim() - scale.dim()))
    scaled = torch.empty_like(weight).copy_(exact(weight) * scale)  # keeps the strides
    return scaled, shift.to(weight)


class _Call(NamedTuple):
    """A convolution or BatchNorm that is running, and what it has run."""

    name: str
    operators: list[tuple[object, tuple, object]]  # operator, arguments, result


def _storages(values: object) -> set[StorageWeakRef]:
    return {
        StorageWeakRef(x.untyped_storage())
        for x in tree_flatten(values)[0]
        if isinstance(x, Tensor) and x.layout is torch.strided
    }


class _Flow(TorchDispatchMode):
    """Watches which operators read the outputs of convolutions.

    Storages are held by weak references: these stay distinct when memory is used again, and keep
    no feature map alive.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._layers: dict[str, nn.Module] = {}
        self._owners: dict[StorageWeakRef, set[str]] = defaultdict(set)  # of parameters, buffers
        self._calls: list[_Call] = []
        self._outputs: dict[StorageWeakRef, str] = {}  # of convolutions
        self._norms_after: dict[str, set[str]] = defaultdict(set)
        self._convs_before: dict[str, set[str]] = defaultdict(set)
        self._excluded: set[str] = set()
        self._hooks = []
        for name, module in model.named_modules():
            if self._is_candidate(module):
                self._add(name, module)
            elif not module._modules and type(module) is not nn.Identity:
                # Other modules may read their input without an operator of torch.
                self._hooks.append(
                    module.register_forward_pre_hook(
                        lambda _, *inputs: self._exclude_sources(inputs), with_kwargs=True
                    )
                )
        self._hooks.append(
            model.register_forward_hook(lambda *result: self._exclude_sources(result[2]))
        )

    @staticmethod
    def _is_candidate(module: nn.Module) -> bool:
        # Hooks may change what goes in and out, a parametrization the weight.
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if isinstance(module, _BatchNorm):
            return not module.training and module._buffers.get('running_var') is not None
        return isinstance(module, _ConvNd) and 'weight' in module._parameters

    def _add(self, name: str, module: nn.Module) -> None:
        self._layers[name] = module
        for storage in _storages([*module._parameters.values(), *module._buffers.values()]):
            self._owners[storage].add(name)
        finish = self._finish_conv if isinstance(module, _ConvNd) else self._finish_norm
        self._hooks += [
            module.register_forward_pre_hook(lambda *_: self._calls.append(_Call(name, []))),
            module.register_forward_hook(lambda *result: finish(self._calls.pop(), result[2])),
        ]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # in inference mode composite operators arrive undivided
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        call = self._calls[-1] if self._calls else None
        read = _storages((args, kwargs))
        for storage in read & self._owners.keys():
            if call is None or call.name not in self._owners[storage]:
                self._excluded |= self._owners[storage]  # something else than the layer reads them
        if call is None or isinstance(self._layers[call.name], _ConvNd):
            self._exclude_sources(args, kwargs)
        if call is not None and read:
            call.operators.append((function, args, result))
        return result

    def _exclude_sources(self, *values: object) -> None:
        """Something else than a BatchNorm reads these."""
        for storage in _storages(values) & self._outputs.keys():
            self._excluded.add(self._outputs[storage])

    def _finish_conv(self, call: _Call, output: object) -> None:
        layer = self._layers[call.name]
        own = _storages([layer.weight, layer.bias])
        uses = [operator for operator in call.operators if _storages(operator[1]) & own]
        if len(uses) == 1:
            function, args, result = uses[0]
            plain = function is torch.ops.aten.convolution.default and result is output
            if plain and args[1] is layer.weight and args[2] is layer.bias:
                self._outputs[StorageWeakRef(output.untyped_storage())] = call.name
                return
        self._excluded.add(call.name)

    def _finish_norm(self, call: _Call, output: object) -> None:
        layer = self._layers[call.name]
        if len(call.operators) == 1:
            function, args, result = call.operators[0]
            # native, cudnn and miopen have the same first arguments, and True only for training.
            plain = 'batch_norm' in str(function) and not any(a is True for a in args)
            own = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
            if plain and all(a is b for a, b in zip(args[1:5], own, strict=True)):
                source = self._outputs.get(StorageWeakRef(args[0].untyped_storage()))
                if source is not None and result[0] is output:
                    # If it were a view, another operator would have been recorded in between.
                    self._norms_after[source].add(call.name)
                    self._convs_before[call.name].add(source)
                    return
        self._excluded.add(call.name)
        for _, args, _ in call.operators:
            self._exclude_sources(args)

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def exclude_alive(self) -> None:
        """An output that outlives the run is one of the model's, or was put somewhere."""
        if not all(storage.expired() for storage in self._outputs):
            gc.collect()
        for storage, name in self._outputs.items():
            if not storage.expired():
                self._excluded.add(name)

    def pairs(self) -> list[tuple[str, str]]:
        found = []
        for conv in self._layers:
            norms = self._norms_after[conv]
            if len(norms) == 1:
                (norm,) = norms
                if self._convs_before[norm] == {conv} and not {conv, norm} & self._excluded:
                    found.append((conv, norm))
        return found
