"""What two processes do in test_several_processes.py: a small network, sharded or replicated."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from mmengine.hooks import SyncBuffersHook
from mmengine.model import MMDistributedDataParallel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from ssn_plugin import SSN, SyncSSN, set_radius

STEPS = 8
COMPILE = dict(fullgraph=True, backend='aot_eager')


def network(kind: type) -> nn.Module:
    """Two convolutions with norms that do not choose alike, and a linear head."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), kind(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3), kind(8), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )
    with torch.no_grad():
        for layer in ssn_layers(model):
            layer.mean_weight.normal_(0, 0.3)
            layer.var_weight.normal_(0, 0.3)
    return model


def ssn_layers(model: nn.Module) -> list[SSN]:
    """The SSN layers in order."""
    return [module for module in model.modules() if isinstance(module, SSN)]


def replicate(model: nn.Module) -> nn.Module:
    """DistributedDataParallel as the train script builds it."""
    return MMDistributedDataParallel(model, device_ids=None, broadcast_buffers=False)


# The recipe of docs/distributed.md


def average_gradient(parameter: nn.Parameter) -> None:
    """What FSDP does for the parameters that it manages."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def shard(model: nn.Module, version: int) -> nn.Module:
    """FSDP of everything but the SSN layers, which every process keeps whole."""
    whole = {parameter for layer in ssn_layers(model) for parameter in layer.parameters()}
    for parameter in whole:
        parameter.register_post_accumulate_grad_hook(average_gradient)
    if version == 1:
        return FullyShardedDataParallel(
            model, ignored_states=list(whole), use_orig_params=True, device_id=torch.device('cpu')
        )
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    for block in (model[0], model[1], model):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    return model


# The end of the recipe


def train(wrapped: nn.Module, rank: int) -> list[float]:
    """Losses of a training in which the radius grows over the circumradius."""
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    torch.manual_seed(1 + rank)
    losses = []
    for step in range(STEPS):
        set_radius(wrapped, step / (STEPS - 1))
        x, target = torch.randn(3, 3, 8, 8), torch.randn(3, 4)
        optimizer.zero_grad()
        loss = (wrapped(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers and of the layers' parameters."""
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for index, layer in enumerate(ssn_layers(model)):
        found |= {f'{index}.{n}': p.detach().clone() for n, p in layer.named_parameters()}
    return found


def refusal(wrap) -> str:
    """What set_radius says about a model that is sharded whole."""
    try:
        set_radius(wrap(network(SSN)), 0.5)
    except ValueError as error:
        return str(error)
    return ''


def compiled_step(rank: int) -> list[list[Tensor]]:
    """Y, gradients and running statistics of a SyncSSN, as it is and compiled into one graph."""
    torch.manual_seed(1 + rank)
    x, dy = torch.randn(2, 3, 4, 5, 5).unbind()
    found = []
    for wrap in (lambda layer: layer, lambda layer: torch.compile(layer, **COMPILE)):
        layer, leaf = SyncSSN(4), x.clone().requires_grad_()
        y = wrap(layer)(leaf)
        y.backward(dy)
        gradients = [parameter.grad for parameter in layer.parameters()]
        found.append([y.detach(), leaf.grad, *gradients, layer.running_mean, layer.running_var])
    return found


def run_all(rank: int, world: int) -> dict:
    """Everything at once, as every start of a process takes seconds."""
    mesh = init_device_mesh('cpu', (world,))
    found = {}
    for kind in (SSN, SyncSSN):
        for name, wrap in (
            ('ddp', replicate),
            ('fsdp1', lambda model: shard(model, 1)),
            ('fsdp2', lambda model: shard(model, 2)),
        ):
            model = network(kind)
            losses = train(wrap(model), rank)
            local = [p.to_local() if hasattr(p, 'to_local') else p for p in model.parameters()]
            selected = [layer.selected for layer in ssn_layers(model)]
            found[kind.__name__, name] = dict(
                losses=losses,
                selected=selected,
                state=state(model),
                numbers=sum(parameter.numel() for parameter in local),
            )
    found['refusals'] = [
        refusal(lambda model: fully_shard(model, mesh=mesh)),
        refusal(
            lambda model: FullyShardedDataParallel(
                model, use_orig_params=True, device_id=torch.device('cpu')
            )
        ),
    ]
    found['eager, compiled'] = compiled_step(rank)
    # Radius, flags and choices in the middle of a training, some of them frozen.
    for kind in (SSN, SyncSSN):
        model = network(kind)
        wrapped = replicate(model)
        train(wrapped, rank)
        layer = ssn_layers(model)[0]
        layer.mean_fixed.zero_()
        layer.mean_choice.fill_(-1)
        layer.radius.fill_(0.7)
        before = state(model)
        SyncBuffersHook().after_train_epoch(SimpleNamespace(model=wrapped))
        found['buffers', kind.__name__] = dict(before=before, after=state(model))
        found['goes on', kind.__name__] = train(wrapped, rank)
    return found
