"""Running statistics of the weights as they are: averages over many batches."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssn_plugin.layers.selected_norm import SelectedNorm
from ssn_plugin.layers.switchable import SwitchableNorm

KINDS = ('running_mean', 'running_var')


def _uses_running_statistics(layer: nn.Module) -> bool:
    if not isinstance(layer, _BatchNorm | SwitchableNorm | SelectedNorm):
        return False
    if layer.running_mean is None or not layer.training:
        return False
    if not isinstance(layer, SwitchableNorm):
        return True
    bn = layer.normalizers.index('BN')
    return bool(layer.mean_ratios[bn] > 0 or layer.var_ratios[bn] > 0)


class _Average:
    """Sums over the calls of a layer, by a forward hook."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        size = len(layer.running_mean)
        # The count and the sums of both statistics, on the CPU because MPS has no float64.
        self.total = torch.zeros(1 + 2 * size, dtype=torch.float64)
        self.held = False
        self.forget()

    def __call__(self, layer: nn.Module, args: tuple, output: Tensor) -> None:
        if not layer.training:  # the model itself puts some layers into evaluation mode: a teacher
            self.held = True
            return
        # The momentum is 1 here, so the running statistics are those of this batch.
        found = torch.cat((layer.running_mean.new_ones(1), layer.running_mean, layer.running_var))
        found = found.cpu()
        if args[0].numel() and bool(found.isfinite().all()):
            self.total += found
        # Also for an empty batch: SyncSSN has taken over what the other processes saw.
        self.forget()

    def forget(self) -> None:
        # A NaN would survive the next update, because 0 * NaN is NaN. Other values are kept,
        # because a layer that the model puts into evaluation mode still needs them.
        if not bool(torch.cat((self.layer.running_mean, self.layer.running_var)).isfinite().all()):
            self.layer.running_mean.zero_()
            self.layer.running_var.fill_(1)

    def result(self) -> tuple[Tensor, Tensor] | None:
        count, sums = self.total[0], self.total[1:]
        return None if count == 0 else (sums / count).chunk(2)


@contextlib.contextmanager
def _in_training_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers are what they were afterwards, those that a module replaced by others, too."""
    places = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in places:
            module._buffers[name] = buffer
            # Write only where the value differs: after a write to its flags a decided layer has
            # to read them again, which waits for the GPU.
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@torch.no_grad()
def batch_averages(
    model: nn.Module, forward: Callable, batches: Iterable
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """Averages of the means and variances of batches, over all processes where there are several.

    ``forward`` is called with every batch, in training mode. Buffers and modes of the model are
    afterwards what they were.

    Returns:
        Name of a layer -> mean and variance, and the names of the layers that no batch gave finite
        ones.
    """
    with _in_training_mode(model), _restored_buffers(model):
        averages = {
            name: _Average(layer)
            for name, layer in model.named_modules()
            if _uses_running_statistics(layer)
        }
        momenta = {name: average.layer.momentum for name, average in averages.items()}
        handles = [average.layer.register_forward_hook(average) for average in averages.values()]
        try:
            for average in averages.values():
                average.layer.momentum = 1.0
            for batch in batches:
                forward(batch)
        finally:
            for handle in handles:
                handle.remove()
            for name, average in averages.items():
                average.layer.momentum = momenta[name]
    if averages:
        joined = _over_processes(torch.cat([average.total for average in averages.values()]))
        sizes = [len(average.total) for average in averages.values()]
        for average, total in zip(averages.values(), joined.split(sizes), strict=True):
            average.total = total
    results = {name: average.result() for name, average in averages.items()}
    found = {name: result for name, result in results.items() if result is not None}
    return found, [n for n, a in averages.items() if n not in found and not a.held]


def _over_processes(total: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return total
    on_gpus = dist.get_backend() == 'nccl'
    joined = total.to(torch.cuda.current_device() if on_gpus else total.device)
    dist.all_reduce(joined)
    return joined.to(total.device)


@torch.no_grad()
def write_statistics(
    model: nn.Module, statistics: Mapping[str, tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Make averages the statistics of their layers; returns buffers and what they were."""
    before = []
    for name, pair in statistics.items():
        layer = model.get_submodule(name)
        for kind, value in zip(KINDS, pair, strict=True):
            buffer = getattr(layer, kind)
            before.append((buffer, buffer.clone()))
            buffer.copy_(value)
    return before


def replace_statistics(
    model: nn.Module, forward: Callable, batches: Iterable
) -> tuple[dict[Tensor, Tensor], list[str]]:
    """Replace running statistics by the averages of the means and variances of batches.

    An average of weights has running statistics of other weights. This is for SSN, SN and
    BatchNorm what ``torch.optim.swa_utils.update_bn`` is for BatchNorm alone. Over several
    processes, each passes batches of its own, and the averages are over all. A batch that is empty,
    or makes a layer inf or NaN, is not counted for that layer. No other buffer changes.

    Args:
        model: Any module.
        forward: Called with every batch, in training mode and without gradient.
        batches: What to average over.

    Returns:
        The buffers that were replaced -> what they were, and the names of the layers that no batch
        gave finite statistics.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN, replace_statistics
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8))
        >>> loader = [(torch.randn(4, 3, 9, 9), torch.zeros(4)) for _ in range(5)]
        >>> replaced, unused = replace_statistics(model, lambda batch: model(batch[0]), loader)
        >>> len(replaced), unused
        (2, [])
    """
    averages, unused = batch_averages(model, forward, batches)
    return dict(write_statistics(model, averages)), unused
