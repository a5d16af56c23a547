"""What a layer moves and launches on a GPU, counted; the table of ops/README.md.

python benchmarks/traffic.py          # print it
python benchmarks/traffic.py --write  # put it into ops/README.md

Float32 and contiguous. BatchNorm2d is counted as if its rows fitted on the chip: one read and one
write forward, two reads and one write backward, in one launch each.
"""

import math
from pathlib import Path

from layer import TRAFFIC
from shapes import SHAPES, Shape
from tables import between_marks, markdown, print_or_write

from ssn_plugin.ops.switchable_norm.triton import launch as backend

README = Path(__file__).parents[1] / 'ssn_plugin' / 'ops' / 'README.md'
RATE = 4.3e12  # bytes per second
# How often a kernel reads or writes something of the size of x; the others move numbers per row.
MOVED = {
    'ssn_fwd_moments_kernel': 1,
    'ssn_fwd_apply_kernel': 2,
    'ssn_bwd_sums_kernel': 2,
    'ssn_bwd_dx_kernel': 3,
}
THREE = ('IN', 'LN', 'BN')


def counted(shape: Shape, selected: tuple) -> list[str]:
    """Launches, megabytes and the time that these take, forward and backward.

    Args:
        shape: The input.
        selected: Indices of what mean and variance selected, or None.
    """
    num, channels, height, width = shape.size
    settings = (num, channels, height * width, 1, 0, THREE, 1, False, selected)
    tracks = selected == (None, None)
    forward = backend._forward_pass(settings, 'sparsestmax', tracks, False, False, 1e-5)
    backward = backend._backward_pass(settings, 'sparsestmax', (True,) * 4, False, 1e-5)
    names = [launch.name for launch in (*forward.launches, *backward.launches)]
    launches = f'{len(forward.launches)} + {len(backward.launches)}'
    return [launches, *moved(shape, sum(MOVED.get(name, 0) for name in names))]


def moved(shape: Shape, times: int) -> list[str]:
    """Megabytes that are read or written, and the microseconds that it takes.

    Args:
        shape: The input.
        times: How often all of it is read or written.
    """
    size = 4 * math.prod(shape.size) * times
    return [f'{size / 1e6:.1f}', f'{1e6 * size / RATE:.1f}']


def table() -> str:
    """All inputs of the benchmark."""
    head = ['place', 'shape', 'launches', 'MB', 'us at 4.3 TB/s']
    head += ['decided on IN, launches', 'MB', 'us', 'BN, MB in 1 + 1', 'us']
    rows = [
        [
            shape.where,
            ' x '.join(map(str, shape.size)),
            *counted(shape, (None, None)),
            *counted(shape, (0, 0)),
            *moved(shape, TRAFFIC['both']),
        ]
        for shape in SHAPES
    ]
    return markdown(head, rows)


def with_table(text: str) -> str:
    """README.md with the table of today between its two marks.

    Args:
        text: README.md.
    """
    return between_marks(text, 'traffic', table())


if __name__ == '__main__':
    print_or_write(__doc__, README, table, with_table)
