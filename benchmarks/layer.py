"""What one norm layer costs, forward and backward, against nn.BatchNorm2d on the same input.

python benchmarks/layer.py                                # CPU, float32, all shapes
python benchmarks/layer.py --device cuda --dtype bfloat16
"""

import argparse
import functools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from parity import require_parity
from records import provenance, write
from shapes import SHAPES, Shape
from straightforward import StraightforwardSSN
from timing import PeakMemory, interleaved, seconds, spread
from torch import Tensor, nn

from ssn_plugin import SN, SSN, set_radius

PAPER = ('IN', 'LN', 'BN')
SHIPPED = ('LN', 'GN', 'BN')  # of configs/_base_/ssn_training.py


def ssn(
    channels: int, selected: tuple[str, str] | None = None, normalizers: Sequence[str] = PAPER
) -> SSN:
    """An SSN that has decided, or one in the middle of its training.

    Args:
        channels: C.
        selected: Normalizers of mean and variance.
        normalizers: Candidates.
    """
    layer = SSN(channels, normalizers=normalizers)
    with torch.no_grad():
        for name, control, chosen in zip(
            ('mean', 'var'),
            ([0.1, 0.0, 0.2, 0.1], [0.0, 0.2, 0.1, 0.1]),
            selected or (None, None),
            strict=True,
        ):
            values = control[: len(normalizers)]
            if chosen is not None:
                values = [float(candidate == chosen) for candidate in layer.normalizers]
            getattr(layer, f'{name}_weight').copy_(torch.tensor(values))
    set_radius(layer, 0.3)
    return layer


# Name in the results -> layer of C channels. 32 groups do not divide 48 channels: 16 do.
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    'BatchNorm2d': nn.BatchNorm2d,
    'SSN undecided': ssn,
    'SSN undecided, LN GN BN': lambda channels: ssn(channels, normalizers=SHIPPED),
    'SSN undecided, IN LN GN BN': lambda channels: ssn(channels, normalizers=('IN', *SHIPPED)),
    'SSN all BN': lambda channels: ssn(channels, ('BN', 'BN')),
    'SSN all LN': lambda channels: ssn(channels, ('LN', 'LN')),
    'SSN all GN': lambda channels: ssn(channels, ('GN', 'GN'), SHIPPED),
    'SSN all IN': lambda channels: ssn(channels, ('IN', 'IN')),
    'SSN LN/BN': lambda channels: ssn(channels, ('LN', 'BN')),
    'SN': SN,
    'GroupNorm(32)': lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
    'GroupNorm(1)': lambda channels: nn.GroupNorm(1, channels),
    'InstanceNorm2d': lambda channels: nn.InstanceNorm2d(channels, affine=True),
    'straightforward SSN': StraightforwardSSN,
}
MODES = ('forward', 'backward', 'both')
# Bytes that the operation cannot avoid, in sizes of x: forward reads x and writes y; backward reads
# x and dy and writes dx.
TRAFFIC = {'forward': 2, 'backward': 3, 'both': 5}


def run_once(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Seconds of one forward and one backward pass.

    Args:
        layer: The layer.
        x: Its input, a leaf.
        dy: Upstream gradient.
    """
    made = []
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    forward = seconds(lambda: made.append(layer(x)), x.device)
    backward = seconds(lambda: made[0].backward(dy), x.device)
    return {'forward': forward, 'backward': backward, 'both': forward + backward}


def peak_bytes(layer: nn.Module, x: Tensor, dy: Tensor) -> int:
    """Peak memory of one forward and backward pass, without x, dy and the parameters.

    Args:
        layer: The layer.
        x: Its input, a leaf.
        dy: Upstream gradient.
    """
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer(x).backward(dy)
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        layer(x).backward(dy)
    return memory.peak


def measure(
    shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int, budget: float
) -> list[dict]:
    """Rows of one shape.

    Args:
        shape: The input.
        device: Where.
        dtype: Of the input; parameters are float32.
        rounds: Interleaved rounds.
        budget: Seconds for them.
    """
    x = torch.randn(shape.size, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn_like(x)
    layers = {name: make(shape.size[1]).to(device) for name, make in LAYERS.items()}
    if shape.size[2:] == (1, 1):
        del layers['InstanceNorm2d']  # it refuses rows of one element
    target = torch.empty_like(x)
    steps = {name: functools.partial(run_once, layer, x, dy) for name, layer in layers.items()}
    steps['copy'] = lambda: {'both': seconds(lambda: target.copy_(x.detach()), device)}
    times = defaultdict(lambda: defaultdict(list))
    for name, figures in interleaved(steps, rounds, budget):
        for mode, value in figures.items():
            times[name][mode].append(value)
    size = x.numel() * x.element_size()
    copy_rate = 2 * size / spread(times['copy']['both']).median
    rows = []
    for name, layer in layers.items():
        peak = peak_bytes(layer, x, dy)
        for mode in MODES:
            base = times['BatchNorm2d'][mode]
            ratio = spread([a / b for a, b in zip(times[name][mode], base, strict=True)])
            taken = spread(times[name][mode])
            rate = TRAFFIC[mode] * size / taken.median
            rows.append(
                {
                    'where': shape.where,
                    'shape': 'x'.join(map(str, shape.size)),
                    'dtype': str(dtype).removeprefix('torch.'),
                    'layer': name,
                    'mode': mode,
                    'ms': f'{1e3 * taken.median:.4f}',
                    'ms_p20': f'{1e3 * taken.p20:.4f}',
                    'ms_p80': f'{1e3 * taken.p80:.4f}',
                    'ratio': f'{ratio.median:.4f}',
                    'ratio_p20': f'{ratio.p20:.4f}',
                    'ratio_p80': f'{ratio.p80:.4f}',
                    'peak_mb': f'{peak / 1e6:.3f}',
                    'gb_per_s': f'{rate / 1e9:.2f}',
                    'of_copy': f'{rate / copy_rate:.3f}',
                    'rounds': len(base),
                }
            )
    return rows


def geometric_mean(values: list[float]) -> float:
    """Geometric mean.

    Args:
        values: Positive numbers.
    """
    return math.exp(sum(map(math.log, values)) / len(values))


def print_table(rows: list[dict], mode: str = 'both') -> None:
    """Ratios to BatchNorm2d, one line per shape, and their geometric mean and maximum.

    Args:
        rows: Of :func:`measure`.
        mode: Of which passes.
    """
    cells = {(r['where'], r['layer']): float(r['ratio']) for r in rows if r['mode'] == mode}
    places = list(dict.fromkeys(row['where'] for row in rows))
    width = max(map(len, places)) + 2
    print(f'\n{mode}: time as a ratio to nn.BatchNorm2d (median of interleaved rounds)')
    names = [name for name in LAYERS if name != 'BatchNorm2d']
    print(' ' * width + ' '.join(f'{name:>{max(len(name), 7)}}' for name in names))
    lines = {place: [cells.get((place, name)) for name in names] for place in places}
    columns = [[r for r in column if r is not None] for column in zip(*lines.values(), strict=True)]
    lines['geometric mean'] = [geometric_mean(column) if column else None for column in columns]
    lines['largest'] = [max(column, default=None) for column in columns]
    for place, values in lines.items():
        texts = ('-' if value is None else f'{value:.3f}' for value in values)
        print(
            f'{place:{width}}'
            + ' '.join(
                f'{text:>{max(len(name), 7)}}' for text, name in zip(texts, names, strict=True)
            )
        )


def main() -> None:
    """Parse, check parity, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: %(default)s)')
    parser.add_argument(
        '--dtype',
        default='float32',
        choices=['float32', 'float16', 'bfloat16'],
        help='of x',
    )
    parser.add_argument('--rounds', type=int, default=25, help='rounds per shape, at most')
    parser.add_argument('--seconds', type=float, default=6.0, help='per shape, about')
    parser.add_argument('--only', default='', help='shapes whose place contains this text')
    parser.add_argument('--name', help='name of the results file (default: layer_DEVICE_DTYPE)')
    args = parser.parse_args()
    device = torch.device(args.device)
    shapes = [shape for shape in SHAPES if args.only in shape.where]
    if not shapes:
        sys.exit(f'layer.py: --only: got {args.only!r}, expected a part of a place in shapes.py')
    require_parity(device)
    torch.manual_seed(0)
    origin = provenance(device)
    rows = []
    for index, shape in enumerate(shapes, 1):
        print(f'[{index}/{len(shapes)}] {shape.where} {shape.size}', flush=True)
        found = measure(shape, device, getattr(torch, args.dtype), args.rounds, args.seconds)
        rows += [{**row, **origin} for row in found]
    for mode in MODES:
        print_table(rows, mode)
    print(f'\nwritten to {write(args.name or f"layer_{device.type}_{args.dtype}", rows)}')


if __name__ == '__main__':
    main()
