"""PreciseStatsHook: BN running statistics of the weights as they are, over many batches."""

import contextlib
import copy
import time
from collections.abc import Callable, Mapping
from itertools import islice
from types import FunctionType
from typing import NamedTuple

import torch
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssn_plugin.engine.averaged_copies import averaged_models
from ssn_plugin.engine.model_wrapper import optim_wrappers, unwrapped
from ssn_plugin.engine.progress import ended_early, is_last_iteration
from ssn_plugin.engine.randomness import preserved_generators, seed_iteration, seed_samples
from ssn_plugin.errors import in_one_line
from ssn_plugin.functional import check_positive
from ssn_plugin.layers.running_statistics import (
    KINDS,
    batch_averages,
    replace_statistics,  # noqa: F401 - code imports it from here, where it was before
    write_statistics,
)


class PreciseStatsHook(Hook):
    """Validate, and end, with running statistics that are an average over many training batches.

    A running average follows the weights with a delay, and at 1 to 4 images per GPU it is noisy: it
    knows the last few dozen images. Before every validation and before the last checkpoint this
    hook passes ``num_batches`` batches of the training set through the model, without gradient, and
    takes as running mean and variance the averages of the batch means and variances. (The authors
    of SN call it batch average.) Layers that use running statistics take part: SSN and SN as far as
    'BN' has a ratio above zero, and BatchNorm; not those that the framework keeps in evaluation
    mode (``norm_eval``, frozen stages).

    Training does not notice: the batches go through a copy of the model and of its preprocessor,
    which shares the trained weights alone, and after a validation the running statistics are what
    they were; random numbers, the order of the data and the optimizer are left alone. Not so what a
    forward pass changes outside of the model (a class, a global variable). What a validation saves
    as the best checkpoint has the averages. They are those of the weights that are validated, of an
    EMAHook for one. Over several processes each passes batches of its own and the averages are over
    all.

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
        check_positive(num_batches, 'num_batches')
        self.num_batches = num_batches
        self._trains = self._said = False
        self._last: list[_Averages] = []
        self._validated: _Averages | None = None
        self._before: list[tuple[Tensor, Tensor]] = []

    def before_run(self, runner) -> None:
        """Register a helper hook that runs before all other hooks when a validation ends."""
        runner._hooks = list(runner.hooks)  # a new list: mmengine is iterating over the old one
        runner.register_hook(_TakeBack(self))

    def before_train(self, runner) -> None:
        """Check that batches can be had."""
        batches = getattr(runner.train_dataloader, 'batch_sampler', None)
        if not hasattr(batches, 'batch_size'):
            kind = type(runner.train_dataloader.dataset).__name__
            raise ValueError(
                f'PreciseStatsHook: train_dataloader: got a {kind} without a batch sampler, '
                'expected data that are drawn by index'
            )
        if not isinstance(batches.batch_size, int):  # mmdet's MultiDataSampler has a list
            raise ValueError(
                f'PreciseStatsHook: train_dataloader: got a {type(batches).__name__} with the '
                f'batch sizes {batches.batch_size}, expected one batch size'
            )
        self._trains = True

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """After the last iteration, and before its checkpoint, make the averages the statistics."""
        if is_last_iteration(runner, batch_idx):
            self._finish(runner)

    def after_train(self, runner) -> None:
        """Make the averages the statistics where the run was ended before its last iteration."""
        if self._trains and ended_early(runner):
            self._finish(runner)

    def _finish(self, runner) -> None:
        for model in (unwrapped(runner.model), *averaged_models(runner)):
            averages = self._estimate(runner, model)
            write_statistics(model, averages.statistics)
            self._last.append(averages)
        self._trains = False  # what follows is validated with these

    def before_val_epoch(self, runner) -> None:
        """Put the averages into the model, which has the weights by now that are validated."""
        model = unwrapped(runner.model)
        if self._trains:
            self._validated = self._estimate(runner, model)
        else:
            known = (averages for averages in self._last if averages.are_of(model.state_dict()))
            self._validated = next(known, None)
        if self._validated is not None:
            self._before = write_statistics(model, self._validated.statistics)

    def take_back(self) -> None:
        """Put the statistics of the training back, while the model is still the one validated."""
        for buffer, value in self._before:
            buffer.copy_(value)
        self._before = []

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Put the averages into what a validation saves as the best.

        A checkpoint to resume from, or of other weights, does not get them.
        """
        best = self._validated is not None and 'optimizer' not in checkpoint
        if best and self._validated.are_of(checkpoint['state_dict']):
            checkpoint['state_dict'].update(self._validated.as_state(checkpoint['state_dict']))

    def after_val(self, runner) -> None:
        """Forget the averages."""
        self.take_back()  # for loops that do not call after_val_epoch
        self._validated = None

    def _estimate(self, runner, model: nn.Module) -> '_Averages':
        start = time.perf_counter()
        loader = _loader_like(runner.train_dataloader, runner.seed, runner.iter)
        batches = min(self.num_batches, _full_batches(loader))
        # Without this list, fork_rng would create a context on every GPU of the machine.
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with preserved_generators(), torch.random.fork_rng(devices):
            seed_iteration(runner.seed, runner.iter)
            working = self._working_copy(runner, model)

            def forward(batch: dict | tuple | list) -> None:
                with contextlib.ExitStack() as stack:
                    for wrapper in optim_wrappers(runner.optim_wrapper):
                        stack.enter_context(wrapper.optim_context(working))
                    data = working.data_preprocessor(batch, True)
                    if isinstance(data, dict):
                        working(**data, mode='loss')
                    else:
                        working(*data, mode='loss')

            averages, unused = batch_averages(working, forward, islice(loader, batches))
        runner.logger.info(
            f'PreciseStatsHook: {len(averages)} layers, {batches} batches, '
            f'{time.perf_counter() - start:.1f} s'
        )
        if unused:
            runner.logger.warning(
                'PreciseStatsHook: no batch gave finite statistics to '
                f'{", ".join(unused)}; they keep their running ones'
            )
        return _Averages(averages, _vectors(model.state_dict()))

    def _working_copy(self, runner, model: nn.Module) -> nn.Module:
        try:
            return _copy_sharing_weights(model)
        except Exception as error:  # a model may hold anything, and raise anything
            if not self._said:
                self._said = True
                runner.logger.warning(
                    f'PreciseStatsHook: the model cannot be copied ({in_one_line(error)}), so it '
                    'is passed batches itself; its buffers are restored, and what else a forward '
                    'pass changes in it is not'
                )
            return model


class _TakeBack(Hook):
    """Before EMAHook has swapped weights, and maybe buffers, out of the model again."""

    priority = 'VERY_HIGH'

    def __init__(self, hook: PreciseStatsHook) -> None:
        self.hook = hook

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.hook.take_back()


class _Averages(NamedTuple):
    """Averages of a model with certain weights.

    Attributes:
        statistics: Name of a layer -> mean and variance.
        vectors: Its parameters and buffers of one dimension, by which one knows its weights again.
    """

    statistics: dict[str, tuple[Tensor, Tensor]]
    vectors: dict[str, Tensor]

    def are_of(self, state: Mapping[str, Tensor]) -> bool:
        return all(
            name in state and torch.equal(value.to(state[name]), state[name])
            for name, value in self.vectors.items()
        )

    def as_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            f'{name}.{kind}': value.to(state[f'{name}.{kind}'])
            for name, pair in self.statistics.items()
            for kind, value in zip(KINDS, pair, strict=True)
        }


def _vectors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in state.items()
        if value.dim() == 1 and not name.endswith(KINDS)
    }


def _copy_sharing_weights(model: nn.Module) -> nn.Module:
    """A copy in which all but what an optimizer trains may change."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    for parameter in model.parameters():
        if not parameter.requires_grad:  # perhaps a moving average that the forward pass updates
            del shared[id(parameter)]
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:  # torch would refuse to copy it
                shared[id(value)] = value.detach().clone()
    copied = copy.deepcopy(model, shared)
    for original, module in zip(model.modules(), copied.modules(), strict=True):
        # A function around the forward pass, compiled or with activation checkpointing, is not
        # copied and goes on to call the original.
        if isinstance(vars(original).get('forward'), FunctionType):
            if getattr(_wrapped(original.forward), '__func__', None) is not type(original).forward:
                raise ValueError(f'{type(original).__name__}.forward is replaced by a function')
            del module.forward
    return copied


def _wrapped(function: Callable) -> Callable:
    """What a function leads to that was put around another one."""
    for name in ('_torchdynamo_orig_callable', '__wrapped__'):
        if hasattr(function, name):
            return _wrapped(getattr(function, name))
    return function


class _SameData(Dataset):
    """A data set under another name: how samples are seeded is written into it."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[index]

    def __getattr__(self, name: str):
        if name.startswith('__') or name == 'dataset':  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _loader_like(loader: DataLoader, seed: int, iteration: int) -> DataLoader:
    """Batches as those of a loader, in an order of their own; the full ones come first."""
    dataset = _SameData(loader.dataset)
    sampler = DefaultSampler(dataset, shuffle=True, seed=seed)
    batches = loader.batch_sampler
    size = min(batches.batch_size, len(sampler))
    ours = DataLoader(
        dataset,
        # With drop_last, mmdet's AspectRatioBatchSampler drops batches of mixed shape too, and
        # their number differs between processes.
        batch_sampler=type(batches)(sampler, batch_size=size, drop_last=False),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
    seed_samples(ours, seed)
    sampler.set_epoch(iteration)
    sampler.begin(iteration)
    return ours


def _full_batches(loader: DataLoader) -> int:
    """With how many full batches a loader begins at least; the same number in every process."""
    return len(loader.batch_sampler.sampler) // loader.batch_sampler.batch_size
