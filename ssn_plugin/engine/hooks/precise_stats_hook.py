"""PreciseStatsHook: BN running statistics of the weights as they are, over many batches."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from mmengine.dataset import DefaultSampler
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from ssn_plugin.engine.model_wrapper import unwrapped
from ssn_plugin.engine.randomness import preserved_generators, seed_iteration, seed_samples
from ssn_plugin.layers.switchable import SwitchableNorm


class PreciseStatsHook(Hook):
    """Validate, and end, with running statistics that are an average over many training batches.

    A running average follows the weights with a delay, and at 1 to 4 images per GPU it is noisy: it
    knows the last few dozen images. Before every validation and before the last checkpoint this
    hook passes ``num_batches`` batches of the training set through the model, without gradient, and
    takes as running mean and variance the averages of the batch means and variances. (The authors
    of SN call it batch average.) Layers that use running statistics take part: SSN and SN as far as
    'BN' has a ratio above zero, and BatchNorm; not those that the host holds in evaluation mode
    (``norm_eval``, frozen stages).

    Training does not notice. After a validation the running statistics are what they were; random
    numbers, the order of the data, layer modes and the optimizer are left alone. What a validation
    saves as the best checkpoint has the averages. With an EMAHook they are those of the averaged
    model. Over several processes each passes batches of its own and the averages are over all.

    A batch that leaves a layer nothing (no proposals) or makes it inf or NaN is not counted for
    that layer.

    Args:
        num_batches: Batches per process; all there are, if those are fewer.

    Raises:
        ValueError: If ``num_batches`` is no positive integer, or, when training begins, if the
            training data cannot be drawn by index, in batches of one size.

    Example:
        >>> custom_hooks = [dict(type='PreciseStatsHook', num_batches=200)]  # in a config

    Source:
        Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", ICLR 2019.
    """

    # After EMAHook, which updates or swaps its model; before CheckpointHook.
    priority = 'LOW'

    def __init__(self, num_batches: int = 200) -> None:
        if isinstance(num_batches, bool) or not isinstance(num_batches, int) or num_batches < 1:
            raise ValueError(f'num_batches: got {num_batches!r}, expected a positive integer')
        self.num_batches = num_batches
        self._trains = False
        self._before: dict[Tensor, Tensor] = {}

    def before_train(self, runner) -> None:
        """Check that batches can be had.

        Args:
            runner: mmengine's Runner.
        """
        batches = getattr(runner.train_dataloader, 'batch_sampler', None)
        if not hasattr(batches, 'batch_size'):
            kind = type(runner.train_dataloader.dataset).__name__
            raise ValueError(
                f'PreciseStatsHook: train_dataloader: got a {kind} without a batch sampler, '
                'expected data that are drawn by index'
            )
        if not isinstance(batches.batch_size, int):  # mmdet has one that mixes several data sets
            raise ValueError(
                f'PreciseStatsHook: train_dataloader: got a {type(batches).__name__} with the '
                f'batch sizes {batches.batch_size}, expected one batch size'
            )
        self._trains = True

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """After the last iteration, and before its checkpoint, make the averages the statistics.

        Args:
            runner: mmengine's Runner.
            batch_idx: Unused.
            data_batch: Unused.
            outputs: Unused.
        """
        if runner.iter + 1 == runner.max_iters:
            for model in (unwrapped(runner.model), *_averaged_models(runner)):
                self._estimate(runner, model)
            self._trains = False  # what follows is validated with these

    def before_val(self, runner) -> None:
        """Put the averages into the model that is going to be validated.

        Args:
            runner: mmengine's Runner.
        """
        if self._trains:
            model = next(iter(_averaged_models(runner)), unwrapped(runner.model))
            self._before = self._estimate(runner, model)

    def before_val_epoch(self, runner) -> None:
        """Hand them to the model in which EMAHook has put the averaged weights, and no buffers.

        Args:
            runner: mmengine's Runner.
        """
        self._swap(runner)

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Take them back, as EMAHook does the weights; the best checkpoint is saved after this.

        Args:
            runner: mmengine's Runner.
            metrics: Unused.
        """
        self._swap(runner)

    def after_val(self, runner) -> None:
        """Go on with the statistics of the training.

        Args:
            runner: mmengine's Runner.
        """
        for buffer, value in self._before.items():
            buffer.copy_(value)
        self._before = {}

    def _swap(self, runner) -> None:
        for hook in runner.hooks:
            averaged = getattr(hook, 'ema_model', None)
            if averaged is None or averaged.update_buffers:
                continue
            pairs = zip(_statistics(averaged.module), _statistics(hook.src_model), strict=True)
            for ours, theirs in pairs:
                value = ours.clone()
                ours.copy_(theirs)
                theirs.copy_(value)

    def _estimate(self, runner, model: nn.Module) -> dict[Tensor, Tensor]:
        """Replace the statistics of a model; returns its buffers that changed, as they were."""
        start = time.perf_counter()
        loader = _loader_like(runner.train_dataloader, runner.seed, runner.iter)
        batches = min(self.num_batches, _full_batches(loader))
        # Without devices given it would touch every GPU of the machine.
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with preserved_generators(), torch.random.fork_rng(devices):
            seed_iteration(runner.seed, runner.iter)

            def forward(batch: dict | tuple | list) -> None:
                with runner.optim_wrapper.optim_context(model):
                    data = model.data_preprocessor(batch, True)
                    if isinstance(data, dict):
                        model(**data, mode='loss')
                    else:
                        model(*data, mode='loss')

            before, unused = replace_statistics(model, forward, islice(loader, batches))
        runner.logger.info(
            f'PreciseStatsHook: {len(before) // 2} layers, {batches} batches, '
            f'{time.perf_counter() - start:.1f} s'
        )
        if unused:
            runner.logger.warning(
                'PreciseStatsHook: no batch gave finite statistics to '
                f'{", ".join(unused)}; they keep their running ones'
            )
        return before


def _averaged_models(runner) -> Iterator[nn.Module]:
    for hook in runner.hooks:
        if getattr(hook, 'ema_model', None) is not None:
            yield hook.ema_model.module


def _loader_like(loader: DataLoader, seed: int, iteration: int) -> DataLoader:
    """Batches as those of a loader, in an order of their own; the full ones come first."""
    # How samples are seeded is written into the data set; that of the training is left alone.
    dataset = copy.copy(loader.dataset)
    sampler = DefaultSampler(dataset, shuffle=True, seed=seed)
    sampler.set_epoch(iteration)
    batches = loader.batch_sampler
    size = min(batches.batch_size, len(sampler))
    ours = DataLoader(
        dataset,
        # Not dropped here: mmdet's sampler drops batches of mixed shape too, and so not as many in
        # every process.
        batch_sampler=type(batches)(sampler, batch_size=size, drop_last=False),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )
    seed_samples(ours, seed)
    return ours


def _full_batches(loader: DataLoader) -> int:
    """With how many full batches a loader begins at least; the same number in every process."""
    return len(loader.batch_sampler.sampler) // loader.batch_sampler.batch_size


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, _BatchNorm | SwitchableNorm) and module.running_mean is not None:
            yield from (module.running_mean, module.running_var)


def _uses_running_statistics(layer: nn.Module) -> bool:
    if not isinstance(layer, _BatchNorm | SwitchableNorm) or layer.running_mean is None:
        return False
    if not layer.training:
        return False
    if isinstance(layer, _BatchNorm):
        return True
    bn = layer.normalizers.index('BN')
    return bool(layer.mean_ratios[bn] > 0 or layer.var_ratios[bn] > 0)


class _Average:
    """Sums over the calls of a layer, by a forward hook."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        size = len(layer.running_mean)
        # The count and the sums of both statistics; on the CPU, as MPS has no float64.
        self.total = torch.zeros(1 + 2 * size, dtype=torch.float64)

    def __call__(self, layer: nn.Module, args: tuple, output: Tensor) -> None:
        # With a momentum of one they are those of this batch.
        found = torch.cat((layer.running_mean.new_ones(1), layer.running_mean, layer.running_var))
        found = found.cpu()
        if args[0].numel() and bool(found.isfinite().all()):
            self.total += found
        # Zero times NaN would stay NaN; SyncSSN meets one without a number of its own.
        layer.reset_running_stats()

    def write(self) -> bool:
        count, sums = self.total[0], self.total[1:]
        if count == 0:
            return False
        for buffer, average in zip(
            (self.layer.running_mean, self.layer.running_var), (sums / count).chunk(2), strict=True
        ):
            buffer.copy_(average)
        return True


@contextlib.contextmanager
def _in_training_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def replace_statistics(
    model: nn.Module, forward: Callable, batches: Iterable
) -> tuple[dict[Tensor, Tensor], list[str]]:
    """Replace running statistics by averages of the statistics of batches.

    Over all processes, where there are several; nothing else of the model changes.

    Args:
        model: Any module.
        forward: Called with every batch, in training mode.
        batches: What to average over.

    Returns:
        The buffers that were replaced -> what they were, and the names of the layers that no batch
        gave finite statistics.
    """
    before = {buffer: buffer.clone() for buffer in model.buffers()}
    with _in_training_mode(model):
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
                average.layer.reset_running_stats()
            for batch in batches:
                forward(batch)
        finally:
            for handle in handles:
                handle.remove()
            for name, average in averages.items():
                average.layer.momentum = momenta[name]
            for buffer, value in before.items():
                # A write would make frozen layers forget what the host knows of them.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
    if averages:
        joined = torch.cat([average.total for average in averages.values()])
        all_reduce(joined)
        sizes = [len(average.total) for average in averages.values()]
        for average, total in zip(averages.values(), joined.split(sizes), strict=True):
            average.total = total
    replaced, unused = {}, []
    for name, average in averages.items():
        if not average.write():
            unused.append(name)
            continue
        for buffer in (average.layer.running_mean, average.layer.running_var):
            replaced[buffer] = before[buffer]
    return replaced, unused
