"""What SyncSSN is compared on: layers, batches of every process, and one step in a process."""

import zlib
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ssn_plugin import SSN, SyncSSN, set_radius
from ssn_plugin.ops.switchable_norm import aten, dispatch

FOUR = ('IN', 'LN', 'BN', 'GN')
CHANNELS = 6


@dataclass
class Case:
    """One layer and, for up to three processes, the shapes of their batches behind (N, C)."""

    name: str
    shapes: tuple[tuple[int, ...], ...] = ((2, 5, 4), (2, 5, 4), (2, 5, 4))
    settings: dict = field(default_factory=dict)
    radius: float = 0.2
    choice: tuple[str, str] | None = None
    mean: float = 1.0
    std: float = 2.0
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    keep_little: bool = False
    steps: int = 1
    needs_dx: bool = True

    def layer(self, kind: type = SyncSSN) -> SSN:
        """The layer, the same in all processes."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        settings = dict(normalizers=FOUR, num_groups=3) | self.settings
        layer = kind(CHANNELS, **settings)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_().add_(1).mul_(0.2)
            for control, name in zip(
                (layer.mean_weight, layer.var_weight), self.choice or (), strict=False
            ):
                control[layer.normalizers.index(name)] = 2
        set_radius(layer, 1.0 if self.choice else self.radius)
        return layer.to(self.dtype)

    def batches(self, world: int, step: int) -> list[tuple[Tensor, Tensor]]:
        """x and dy of every process, in float64; channels and processes differ in their means."""
        torch.manual_seed(zlib.crc32(f'{self.name} {step}'.encode()))
        found = []
        for num, *spatial in self.shapes[:world]:
            shape = (num, CHANNELS, *spatial)
            offset = 1 + torch.randn(1, CHANNELS, *[1] * len(spatial))
            x = (torch.randn(shape) * self.std + self.mean * offset).to(self.dtype)
            found.append((x.double(), torch.randn(shape).to(self.dtype).double()))
        return found


CASES = [
    Case('equal'),
    Case('float64', dtype=torch.float64),
    Case('unequal', ((1, 5, 4), (4, 5, 4), (2, 5, 4))),
    Case('unequal sizes', ((2, 5, 4), (3, 7, 3), (1, 1, 1))),
    Case('first is empty', ((0, 5, 4), (3, 5, 4), (2, 5, 4))),
    Case('last is empty', ((2, 5, 4), (0, 5, 4), (0, 5, 4))),
    Case('no positions', ((2, 5, 4), (2, 0, 4), (2, 5, 4))),
    Case('all are empty', ((0, 5, 4), (0, 5, 4), (0, 5, 4))),
    Case('one element', ((1, 1, 1), (0, 1, 1), (0, 1, 1))),
    Case('one position', ((1, 1, 1), (1, 1, 1), (3, 1, 1))),
    Case('vectors', ((4,), (3,), (1,)), dict(normalizers=('LN', 'BN', 'GN'))),
    Case('volumes', ((1, 3, 2, 4), (2, 3, 2, 4), (1, 3, 2, 4))),
    Case('correction', settings=dict(correction=1)),
    Case('correction, unequal sizes', ((2, 5, 4), (3, 7, 3), (1, 1, 1)), dict(correction=1)),
    Case('cumulative', ((1, 5, 4), (3, 5, 4), (0, 5, 4)), dict(momentum=None), steps=3),
    Case('untracked', settings=dict(track_running_stats=False)),
    Case('plain', settings=dict(affine=False, normalizers=('IN', 'LN', 'BN'))),
    Case('large mean', mean=1000.0, std=1.0),
    Case('large mean, float64', mean=1000.0, std=1.0, dtype=torch.float64),
    Case('little kept', ((1, 5, 4), (4, 5, 4), (2, 5, 4)), keep_little=True),
    Case('autocast', autocast=True),
    Case('bfloat16', autocast=True, dtype=torch.bfloat16),
    Case('sparse', radius=0.75),
    Case('no dx', needs_dx=False),
    Case('decided BN', choice=('BN', 'BN')),
    Case('decided BN, unequal', ((1, 5, 4), (4, 5, 4), (0, 5, 4)), choice=('BN', 'BN')),
    Case('decided mean', choice=('BN', 'LN')),
    Case('decided variance', choice=('IN', 'BN')),
    Case('decided others', ((2, 5, 4), (0, 5, 4), (1, 5, 4)), choice=('IN', 'LN')),
    Case('decided GN', choice=('GN', 'GN')),
]


class Counter:
    """Counts the collectives of a process, and the numbers in them."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.original = dist.all_reduce

    def __call__(self, tensor: Tensor, *args, **kwargs):
        self.numbers.append(tensor.numel())
        return self.original(tensor, *args, **kwargs)

    def taken(self) -> list[int]:
        """What was counted since the last time."""
        numbers, self.numbers = self.numbers, []
        return numbers


def step(case: Case, layer: SSN, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Y, dx and the gradients of the parameters."""
    x = x.to(case.dtype).requires_grad_(case.needs_dx)
    y = layer(x)
    layer.zero_grad()
    y.backward(dy.to(y.dtype))
    found = dict(y=y.detach()) | ({'dx': x.grad} if case.needs_dx else {})
    return found | {f'd{name}': p.grad.clone() for name, p in layer.named_parameters()}


def run_cases(rank: int, world: int, backend: str) -> dict[str, dict]:
    """All cases in one process: tensors of the last step, buffers, collectives."""
    dispatch._BACKEND = backend
    counter = dist.all_reduce = Counter()
    found = {}
    for case in CASES:
        aten._SMALL = 0 if case.keep_little else 2**20
        layer = case.layer().float() if case.autocast else case.layer()
        context = torch.autocast('cpu', torch.bfloat16) if case.autocast else nullcontext()
        with context:
            for count in range(case.steps):
                x, dy = case.batches(world, count)[rank]
                counter.taken()
                tensors = step(case, layer, x, dy)
        tensors |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
        found[case.name] = dict(tensors=tensors, collectives=counter.taken())
    return found
