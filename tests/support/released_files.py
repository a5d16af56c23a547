"""Files in the layout of the authors' SSN and SN releases, made from its key and shape rules.

Nothing here is taken from the package: names, shapes, dtypes and what else lies in such a file
stand in their description alone.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}


def layers(depth: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of convolutions with their shapes, and of norms with (channels,), in their order."""
    bottleneck = depth >= 50
    expansion = 4 if bottleneck else 1
    yield 'conv1', (width, 3, 7, 7)
    yield 'sn1', (width,)
    entering = width
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        inner = width * 2 ** (stage - 1)
        leaving = inner * expansion
        for block in range(blocks):
            name = f'layer{stage}.{block}'
            if bottleneck:
                kernels = [(inner, entering, 1), (inner, inner, 3), (leaving, inner, 1)]
            else:
                kernels = [(inner, entering, 3), (inner, inner, 3)]
            for i, (outputs, inputs, size) in enumerate(kernels, start=1):
                yield f'{name}.conv{i}', (outputs, inputs, size, size)
                yield f'{name}.sn{i}', (outputs,)
            if block == 0 and (entering != leaving or stage > 1):
                yield f'{name}.downsample.0', (leaving, entering, 1, 1)
                yield f'{name}.downsample.1', (leaving,)
            entering = leaving


def released_state(
    depth: int = 18,
    width: int = 8,
    kind: str = 'SSN',
    undecided: float = 0.0,
    radius: float = 1.0,
    using_bn: bool = True,
    seed: int = 0,
) -> OrderedDict[str, Tensor]:
    """A state dict of the released layout, with random values of a network that works.

    Args:
        depth: 18, 34, 50 or 101.
        width: Channels of the stem, 64 in the released files.
        kind: 'SSN' or 'SN'.
        undecided: Share of the ratios of an SSN that are not frozen.
        radius: Of an SSN.
        using_bn: Whether an SN has BN among its candidates; else two logits, no running statistics.
        seed: Of the values.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    candidates = 3 if using_bn else 2
    state = OrderedDict()
    for name, shape in layers(depth, width):
        if len(shape) == 4:
            gain = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
            state[f'{name}.weight'] = gain * torch.randn(shape, generator=generator)
            continue
        channels = shape[0]
        # The last norm of a block starts at weight 0 and stays small, which is what keeps rounding
        # errors from growing from block to block.
        ends_block = name.endswith('sn3' if depth >= 50 else 'sn2')
        low, high = (0, 0.4) if ends_block else (0.5, 1.5)
        state[f'{name}.weight'] = uniform(low, high, 1, channels, 1, 1)
        state[f'{name}.bias'] = uniform(-0.3, 0.3, 1, channels, 1, 1)
        fixed = {}
        for statistic in ('mean', 'var'):
            logits = 0.7 * torch.randn(candidates, generator=generator)
            fixed[statistic] = kind == 'SSN' and float(uniform(0, 1, 1)) >= undecided
            if fixed[statistic]:
                logits = torch.eye(candidates)[logits.argmax()]
            state[f'{name}.{statistic}_weight'] = logits
        if using_bn:
            state[f'{name}.running_mean'] = uniform(-0.5, 0.5, 1, channels, 1)
            state[f'{name}.running_var'] = uniform(0.5, 2, 1, channels, 1)
        if kind == 'SSN':
            for statistic in ('mean', 'var'):
                flag = torch.tensor([int(fixed[statistic])], dtype=torch.int64)
                state[f'{name}.{statistic}_fixed'] = flag
            state[f'{name}.radius'] = torch.tensor([radius], dtype=torch.float32)
    features = width * 8 * (4 if depth >= 50 else 1)
    state['fc.weight'] = uniform(-0.1, 0.1, 10, features)
    state['fc.bias'] = uniform(-0.1, 0.1, 10)
    return state


def released_checkpoint(
    state: OrderedDict[str, Tensor], module: bool = True, classifier: bool = True
) -> dict:
    """What lies in a released file: the state dict and what a training script kept beside it."""
    if not classifier:
        state = OrderedDict((k, v) for k, v in state.items() if not k.startswith('fc.'))
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[30, 60, 90])
    parameter.grad = torch.ones(3)
    optimizer.step()
    return dict(
        epoch=100,
        model='resnet_v1_ssn',
        state_dict=OrderedDict((f'{"module." * module}{k}', v) for k, v in state.items()),
        best_prec1=np.float64(75.848),
        optimizer=optimizer.state_dict(),
        lr_scheduler=scheduler.state_dict(),
    )


def save(checkpoint: object, path: Path, legacy: bool = False) -> str:
    """Write a file as today's torch does, or as that of 2019 did; returns its name."""
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def released_file(path: Path, legacy: bool = True, module: bool = True, **kwargs) -> str:
    """Write a released file with a state dict of :func:`released_state`; returns its name."""
    return save(released_checkpoint(released_state(**kwargs), module), path, legacy)
