"""What an undecided layer moves and launches on a GPU, counted; the table of ops/README.md.

python benchmarks/traffic.py          # print it
python benchmarks/traffic.py --write  # put it into ops/README.md

Float32 and contiguous. BatchNorm2d is counted as if its rows fitted on the chip: one read and one
write forward, two reads and one write backward, in one launch each.
"""

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


def line_of(shape: Shape) -> list[str]:
    """Cells of one input.

    Args:
        shape: The input.
    """
    num, channels, height, width = shape.size
    settings = (num, channels, height * width, 1, 0, THREE, 1, False, (None, None))
    forward = backend._forward_pass(settings, 'sparsestmax', True, False, False, 1e-5)
    backward = backend._backward_pass(settings, 'sparsestmax', (True,) * 4, False, 1e-5)
    size = 4 * num * channels * height * width
    names = [launch.name for launch in (*forward.launches, *backward.launches)]
    moved = size * sum(MOVED.get(name, 0) for name in names)
    least = size * TRAFFIC['both']
    return [
        shape.where,
        ' x '.join(map(str, shape.size)),
        f'{len(forward.launches)} + {len(backward.launches)}',
        f'{moved / 1e6:.1f}',
        f'{1e6 * moved / RATE:.1f}',
        '1 + 1',
        f'{least / 1e6:.1f}',
        f'{1e6 * least / RATE:.1f}',
    ]


def table() -> str:
    """All inputs of the benchmark."""
    head = ['place', 'shape', 'launches', 'MB', 'us at 4.3 TB/s']
    head += ['BN, launches', 'BN, MB', 'BN, us']
    return markdown(head, [line_of(shape) for shape in SHAPES])


def with_table(text: str) -> str:
    """README.md with the table of today between its two marks.

    Args:
        text: README.md.
    """
    return between_marks(text, 'traffic', table())


if __name__ == '__main__':
    print_or_write(__doc__, README, table, with_table)
