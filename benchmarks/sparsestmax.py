"""What SparsestMax alone costs, forward and backward, against softmax.

python benchmarks/sparsestmax.py
"""

import argparse
import functools
from collections import defaultdict
from collections.abc import Callable

import torch
from parity import require_parity
from records import provenance, write
from timing import interleaved, seconds, spread
from torch import Tensor

from ssn_plugin import sparsestmax
from ssn_plugin.ops import reference

# Rows and candidates: one layer's two vectors, those of a whole Mask R-CNN, and a large batch.
SIZES = ((2, 3), (2, 4), (138, 3), (10000, 3), (10000, 16))
RADIUS = 0.3


def row_by_row(z: Tensor) -> Tensor:
    """The paper's recursion, vector by vector, with plain autograd.

    Args:
        z: Shape (rows, K).
    """
    return torch.stack([reference.sparsestmax(row, RADIUS) for row in z])


def functions(rows: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compared; the recursion only where it ends within a moment.

    Args:
        rows: Number of vectors.
    """
    found = {
        'softmax': functools.partial(torch.softmax, dim=-1),
        'sparsestmax': functools.partial(sparsestmax, radius=RADIUS),
    }
    return {**found, 'recursion of the paper': row_by_row} if rows <= 1000 else found


def run_once(function: Callable[[Tensor], Tensor], z: Tensor, upstream: Tensor) -> dict:
    """Seconds of one forward and one backward pass.

    Args:
        function: What to time.
        z: A leaf, (rows, K).
        upstream: Gradient of the result.
    """
    made = []
    z.grad = None
    forward = seconds(lambda: made.append(function(z)), z.device)
    backward = seconds(lambda: made[0].backward(upstream), z.device)
    return {'forward': forward, 'backward': backward}


def main() -> None:
    """Parse, check parity, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=100, help='rounds per size, at most')
    args = parser.parse_args()
    device = torch.device(args.device)
    require_parity(device)
    torch.manual_seed(0)
    origin = provenance(device)
    rows = []
    for size in SIZES:
        z = torch.randn(size, device=device).requires_grad_()
        upstream = torch.randn_like(z)
        steps = {
            name: functools.partial(run_once, function, z, upstream)
            for name, function in functions(size[0]).items()
        }
        times = defaultdict(lambda: defaultdict(list))
        for name, figures in interleaved(steps, args.rounds, budget=5):
            for mode, value in figures.items():
                times[name][mode].append(value)
        for name, modes in times.items():
            for mode, values in modes.items():
                taken = spread(values)
                ratio = spread([a / b for a, b in zip(values, times['softmax'][mode], strict=True)])
                rows.append(
                    {
                        'shape': 'x'.join(map(str, size)),
                        'function': name,
                        'mode': mode,
                        'us': f'{1e6 * taken.median:.1f}',
                        'us_p20': f'{1e6 * taken.p20:.1f}',
                        'us_p80': f'{1e6 * taken.p80:.1f}',
                        'ratio': f'{ratio.median:.2f}',
                        'rounds': len(values),
                        **origin,
                    }
                )
                print(
                    f'{rows[-1]["shape"]:>9} {name:24}{mode:9}{rows[-1]["us"]:>10} us, '
                    f'{rows[-1]["ratio"]:>8} x softmax'
                )
    print(f'written to {write(f"sparsestmax_{device.type}", rows)}')


if __name__ == '__main__':
    main()
