"""What the time of a small input goes to: operators, and Python around them.

python benchmarks/profile_layer.py 2x512x1x1
"""

import argparse
import sys
import time

import torch
from layer import ssn
from parity import require_parity
from torch import nn
from torch.profiler import ProfilerActivity, profile

ROUNDS = 300


def main() -> None:
    """Parse, check parity, time, profile, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('shape', help='NxCxHxW')
    args = parser.parse_args()
    try:
        size = tuple(int(number) for number in args.shape.split('x'))
        x = torch.randn(size).requires_grad_()
    except (ValueError, RuntimeError):
        sys.exit(f'profile_layer.py: shape: got {args.shape!r}, expected NxCxHxW')
    require_parity(x.device)
    dy = torch.randn_like(x)
    for name, layer in (('nn.BatchNorm2d', nn.BatchNorm2d(size[1])), ('SSN', ssn(size[1]))):
        for _ in range(20):
            layer(x).backward(dy)
        start = time.perf_counter()
        for _ in range(ROUNDS):
            layer(x).backward(dy)
        taken = (time.perf_counter() - start) / ROUNDS
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(ROUNDS):
                layer(x).backward(dy)
        events = recorded.key_averages()
        operators = [event for event in events if event.key.startswith('aten::')]
        inside = sum(event.self_cpu_time_total for event in operators) / ROUNDS
        total = sum(event.self_cpu_time_total for event in events) / ROUNDS
        calls = sum(event.count for event in operators) / ROUNDS
        print(
            f'{name} at {args.shape}: {1e6 * taken:.0f} us for forward and backward. Under the '
            f'profiler {total:.0f} us, of which {inside:.0f} us in {calls:.0f} operators of ATen '
            f'and {total - inside:.0f} us in Python and autograd'
        )
        for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:8]:
            share = event.self_cpu_time_total / ROUNDS
            print(f'    {share:8.1f} us {event.count / ROUNDS:5.0f} x {event.key}')


if __name__ == '__main__':
    main()
