"""MPS simulated: a device without float64 and collectives, of which none was at hand."""

import torch
import torch.distributed as dist
from synced_cases import CASES, step
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

CPU, MPS = torch.device('cpu'), torch.device('mps')


class OnMPS(Tensor):
    """A tensor of that device; what comes of it is there too, unless it is moved to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == Tensor.device.__get__:
            return MPS
        if function is Tensor.cpu or (function is Tensor.to and CPU in args):
            return args[0].detach().as_subclass(Tensor)
        result = super().__torch_function__(function, types, args, kwargs or {})
        for each in tree_flatten(result)[0]:
            if isinstance(each, OnMPS) and each.dtype == torch.float64:
                raise TypeError('Cannot convert a MPS Tensor to float64 dtype')
        return result


class MadeThere(TorchFunctionMode):
    """Makes tensors of that device where a function is asked for new ones."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.backward:  # which would switch the simulation off
            with self:
                engine = torch.autograd.Variable._execution_engine
                return engine.run_backward(
                    (args[0],),
                    (kwargs['gradient'],),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        if kwargs.get('device') != MPS:
            return function(*args, **kwargs)
        return function(*args, **kwargs | dict(device=CPU)).as_subclass(OnMPS)


def moved(model: nn.Module) -> nn.Module:
    """The model, its parameters and buffers there."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().as_subclass(OnMPS))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.as_subclass(OnMPS)
    return model


def run_cases(rank: int, world: int) -> dict[str, list[dict]]:
    """Every case in float32, in one process, on the CPU and there: all tensors of a step."""
    reduce = dist.all_reduce

    def refuse_mps(tensor, *arguments, **options):
        if isinstance(tensor, OnMPS):
            raise RuntimeError('No backend type associated with device type mps')
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = refuse_mps
    found = {}
    for case in CASES:
        if case.dtype != torch.float32 or case.autocast:
            continue
        found[case.name] = []
        for kind in (Tensor, OnMPS):
            layer = case.layer() if kind is Tensor else moved(case.layer())
            for number in range(case.steps):
                x, dy = (t.float() for t in case.batches(world, number)[rank])
                with MadeThere():
                    tensors = step(case, layer, x.as_subclass(kind), dy.as_subclass(kind))
            tensors |= dict(layer.named_buffers())
            found[case.name].append({k: t.detach().cpu().clone() for k, t in tensors.items()})
    return found
