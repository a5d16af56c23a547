"""The GPU's verdict in parts; run_gpu.sh runs them all.

python benchmarks/gpu.py smoke OUT             # does every layer compute what float64 computes?
python benchmarks/gpu.py warm OUT              # compile for all inputs of the next part
python benchmarks/gpu.py layers OUT            # device, eager and CPU time beside BatchNorm2d
python benchmarks/gpu.py step OUT              # a Mask R-CNN training step, of torchvision alone
python benchmarks/gpu.py names OUT             # which kernels BatchNorm2d runs
python benchmarks/gpu.py tables OUT            # what the parts wrote

On the CPU the same code runs on tiny inputs, which checks the script and measures nothing.
"""

import argparse
import copy
import csv
import functools
import math
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from layer import LAYERS, geometric_mean, ssn
from shapes import MASK_RCNN, Shape
from timing import interleaved, seconds, spread
from torch import Tensor, nn

from ssn_plugin import SSN, set_radius

CUDA = torch.cuda.is_available()
DEVICE = torch.device('cuda' if CUDA else 'cpu')
ON_GPU = 'device time by graph replay'
TINY = (Shape('tiny map', (2, 4, 3, 3), 1),)
REPEATS = 8 if CUDA else 1
SMOKE = ('SSN undecided', 'SSN all BN', 'SSN all LN', 'SSN all IN', 'SSN LN/BN', 'SN')
MEASURED = ('BatchNorm2d', 'SSN undecided', 'SSN all BN', 'SSN LN/BN')
IMAGE, REGIONS = ((800, 1344), 512) if CUDA else ((64, 96), 4)
BUFFERS = 2**28  # bytes to rotate over, several times what a second-level cache holds


def results(layer: nn.Module, x: Tensor, dy: Tensor, needs_dx: bool) -> dict[str, Tensor]:
    """Y and gradients of one call."""
    x = x.detach().requires_grad_(needs_dx)
    y = layer(x)
    y.backward(dy.to(y.dtype))
    found = {'y': y.detach()} | ({'dx': x.grad} if needs_dx else {})
    return found | {name: p.grad.clone() for name, p in layer.named_parameters()}


def compare(what: str, found: dict[str, Tensor], exact: dict[str, Tensor], bound: float) -> bool:
    """Whether all is within ``bound`` of float64, relative to a whole tensor; says what is not."""
    for name, value in exact.items():
        error = (found[name].double() - value).norm().item()
        size = value.norm().item()
        if not error <= bound * size + 20 * bound * exact['y'].norm().item() * ('weight' in name):
            print(f'FAILED {what}: {name} is off by {error:.3g}, its norm is {size:.3g}')
            return False
    return True


def smoke(out: Path) -> None:
    """Every layer, x with and without gradient, one AMP step, one batch shared by processes."""
    torch.manual_seed(0)
    shape = (4, 64, 28, 28) if CUDA else (2, 8, 3, 2)
    good = True
    for name in SMOKE:
        for needs_dx in (True, False):
            layer = LAYERS[name](shape[1]).to(DEVICE)
            exact = copy.deepcopy(layer).double()
            x, dy = torch.randn(2, *shape, device=DEVICE)
            found = results(layer, x, dy, needs_dx)
            expected = results(exact, x.double(), dy.double(), needs_dx)
            good &= compare(f'{name}, x with gradient: {needs_dx}', found, expected, 1e-5)
    layer = nn.Sequential(nn.Conv2d(3, 8, 3), ssn(8)).to(DEVICE)
    with torch.autocast(DEVICE.type, torch.float16 if CUDA else torch.bfloat16):
        loss = layer(torch.randn(2, 3, 9, 9, device=DEVICE)).float().square().mean()
    loss.backward()
    if not all(p.grad.isfinite().all() for p in layer.parameters()):
        good = False
        print('FAILED AMP: a gradient is not finite')
    dist.init_process_group(
        'nccl' if CUDA else 'gloo',
        init_method=f'file://{out.resolve()}/store',
        rank=0,
        world_size=1,
    )
    layer = ssn(shape[1]).to(DEVICE)
    exact = copy.deepcopy(layer).double()
    layer._group = dist.group.WORLD  # SyncSSN leaves a group of one process alone
    x, dy = torch.randn(2, *shape, device=DEVICE)
    expected = results(exact, x.double(), dy.double(), True)
    good &= compare('SyncSSN', results(layer, x, dy, True), expected, 1e-5)
    dist.destroy_process_group()
    print('smoke: every layer is right' if good else 'smoke: FAILED')
    sys.exit(0 if good else 1)


def rotating(
    shape: Shape, dtype: torch.dtype, last: bool, most: int = 64
) -> list[tuple[Tensor, Tensor]]:
    """Inputs and upstream gradients that do not fit into the cache together."""
    layout = torch.channels_last if last else torch.contiguous_format
    size = 2 * math.prod(shape.size) * dtype.itemsize
    count = min(max(2, BUFFERS // size), most) if CUDA else 1
    pairs = []
    for _ in range(count):
        x, dy = (
            torch.randn(shape.size, device=DEVICE, dtype=dtype).to(memory_format=layout)
            for _ in range(2)
        )
        pairs.append((x.requires_grad_(), dy))
    return pairs


def once(layer: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Forward and backward on each pair."""
    leaves = [p for p in layer.parameters() if p.requires_grad]
    for x, dy in pairs:
        torch.autograd.grad(layer(x), [x, *leaves], dy)


def graph_of(layer: nn.Module, pairs: list[tuple[Tensor, Tensor]]):
    """What replays :func:`once` without the CPU; the call itself on the CPU."""
    if not CUDA:
        return functools.partial(once, layer, pairs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once(layer, pairs[:1])
        once(layer, pairs[:1])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once(layer, pairs)
    return graph.replay


def cpu_seconds(layer: nn.Module, pair: tuple[Tensor, Tensor]) -> float:
    """Time of the CPU for one forward and backward, while the device has a queue to work off."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        once(layer, [pair])
    taken = (time.perf_counter() - start) / REPEATS
    if CUDA:
        torch.cuda.synchronize()
    return taken


def measure(shape: Shape, dtype: torch.dtype, last: bool) -> list[dict]:
    """Rows of one input."""
    pairs = rotating(shape, dtype, last)
    layers = {name: LAYERS[name](shape.size[1]).to(DEVICE) for name in MEASURED}
    replays = {name: graph_of(layer, pairs) for name, layer in layers.items()}
    target = torch.empty_like(pairs[0][0])
    replays['copy'] = lambda: [target.copy_(x.detach()) for x, _ in pairs]
    steps = {name: lambda f=f: {'device': seconds(f, DEVICE)} for name, f in replays.items()}
    times = defaultdict(list)
    for name, figures in interleaved(steps, REPEATS, 0.15):
        times[name].append(figures['device'] / len(pairs))
    eager = {n: seconds(lambda m=m: once(m, pairs), DEVICE) / len(pairs) for n, m in layers.items()}
    on_cpu = {
        name: min(cpu_seconds(m, pairs[0]) for _ in range(min(REPEATS, 3)))
        for name, m in layers.items()
    }
    size = math.prod(shape.size) * dtype.itemsize
    copy_rate = 2 * size / spread(times['copy']).median
    rows = []
    for name in layers:
        taken = spread(times[name]).median
        rows.append(
            {
                'where': shape.where,
                'shape': 'x'.join(map(str, shape.size)),
                'dtype': str(dtype).removeprefix('torch.'),
                'layout': 'channels_last' if last else 'contiguous',
                'layer': name,
                'device_us': f'{1e6 * taken:.2f}',
                'ratio': f'{taken / spread(times["BatchNorm2d"]).median:.3f}',
                'eager_us': f'{1e6 * eager[name]:.2f}',
                'cpu_us': f'{1e6 * on_cpu[name]:.2f}',
                'of_copy': f'{5 * size / taken / copy_rate:.3f}',  # bytes no layer can avoid
                'mb': f'{size / 1e6:.1f}',
            }
        )
    return rows


def inputs() -> list[tuple[Shape, torch.dtype, bool]]:
    """What is measured: shape, dtype, channels_last or not; frequent shapes first."""
    shapes = sorted(MASK_RCNN, key=lambda shape: -shape.count) if CUDA else TINY
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if CUDA else (torch.float32,)
    return [(shape, *kind) for *kind, shape in product(dtypes, (False, True), shapes)]


def warm(share: str) -> None:
    """Compile what the layers launch, and keep it where Triton finds it again.

    Args:
        share: Which inputs: '0/4' is every fourth, from the first on.
    """
    first, step = map(int, share.split('/'))
    for shape, dtype, last in inputs()[first::step]:
        pair = rotating(shape, dtype, last, most=1)
        for name in MEASURED:
            once(LAYERS[name](shape.size[1]).to(DEVICE), pair)


def layers(out: Path, budget: float) -> None:
    """Every input of the benchmark, as long as the budget lasts."""
    start, rows, left = time.perf_counter(), [], 0
    for shape, dtype, last in inputs():
        if time.perf_counter() - start > budget:
            left += 1
            continue
        rows += measure(shape, dtype, last)
        write(out / 'layers.csv', rows)
    if left:
        print(f'layers: {left} inputs were left out, after {budget:.0f} s')


def mask_rcnn(make, classes: int = 91) -> nn.Module:
    """Mask R-CNN R50-FPN of torchvision with a norm layer in all 69 places of `ssn-all`."""
    from torchvision.models import resnet50
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

    backbone = _resnet_fpn_extractor(resnet50(norm_layer=make), 5, norm_layer=make)
    return MaskRCNN(
        backbone,
        classes,
        min_size=IMAGE[0],
        max_size=IMAGE[1],
        box_batch_size_per_image=REGIONS,
        box_head=FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=make),
        mask_head=MaskRCNNHeads(256, [256] * 4, 1, norm_layer=make),
    )


def targets(height: int, width: int) -> list[dict[str, Tensor]]:
    """Two images' objects."""
    found = []
    for _ in range(2):
        corner = torch.rand(16, 2) * 0.6
        boxes = torch.cat([corner, corner + 0.1 + 0.25 * torch.rand(16, 2)], 1)
        boxes = boxes * torch.tensor([width, height] * 2)
        masks = torch.zeros(16, height, width, dtype=torch.uint8)
        for mask, (a, b, c, d) in zip(masks, boxes.int().tolist(), strict=True):
            mask[b:d, a:c] = 1
        sample = dict(boxes=boxes, labels=torch.randint(1, 91, (16,)), masks=masks)
        found.append({name: value.to(DEVICE) for name, value in sample.items()})
    return found


def train_once(
    model: nn.Module, optimizer, images, labels, amp: bool, radius: float | None
) -> dict:
    """Seconds of a training step."""
    torch.manual_seed(0)  # the same samples of proposals for every norm

    def run() -> None:
        if radius is not None:
            set_radius(model, radius)
        half = torch.float16 if CUDA else torch.bfloat16
        context = torch.autocast(DEVICE.type, half) if amp else nullcontext()
        with context:
            losses = model(images, labels)
        optimizer.zero_grad(set_to_none=True)
        (sum(losses.values()) * (1024 if amp else 1)).backward()
        if amp:
            torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], 1024)
        optimizer.step()

    return {'step': seconds(run, DEVICE)}


def step(out: Path, budget: float) -> None:
    """Whole training steps with BN, SSN with and without set_radius, and GN."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # beside another build of torch it fails in ways of its own
        print(f'step: not measured, torchvision cannot be imported ({type(error).__name__})')
        return
    images = list(torch.rand(2, 3, *IMAGE, device=DEVICE))
    labels, rows = targets(*IMAGE), []
    norms = {
        'BN': (nn.BatchNorm2d, None),
        'SSN': (ssn, None),
        'SSN, set_radius': (ssn, 0.3),
        'GN': (LAYERS['GroupNorm(32)'], None),
    }
    for amp in (False, True):
        steps = {}
        for name, (make, radius) in norms.items():
            torch.manual_seed(0)
            model = mask_rcnn(make).to(DEVICE).train()
            count = sum(isinstance(m, nn.BatchNorm2d | nn.GroupNorm | SSN) for m in model.modules())
            if count != 69:
                sys.exit(f'step: got {count} norm layers, expected 69')
            optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
            steps[name] = functools.partial(
                train_once, model, optimizer, images, labels, amp, radius
            )
        times = defaultdict(list)
        for name, figures in interleaved(steps, 20 if CUDA else 1, budget / 2):
            times[name].append(figures['step'])
        for name, values in times.items():
            ratio = spread([a / b for a, b in zip(values, times['BN'], strict=True)])
            rows.append(
                {
                    'precision': 'AMP' if amp else 'float32',
                    'norm': name,
                    'ms': f'{1e3 * spread(values).median:.1f}',
                    'ratio': f'{ratio.median:.3f}',
                    'p20': f'{ratio.p20:.3f}',
                    'p80': f'{ratio.p80:.3f}',
                    'rounds': len(values),
                }
            )
        write(out / 'step.csv', rows)


def names(out: Path) -> None:
    """The kernels of BatchNorm2d and of an SSN on one input."""
    shape = (2, 256, 50, 84) if CUDA else (2, 8, 3, 2)
    kinds = [torch.profiler.ProfilerActivity.CUDA if CUDA else torch.profiler.ProfilerActivity.CPU]
    rows = []
    for name in ('BatchNorm2d', 'SSN undecided', 'SSN all BN'):
        layer = LAYERS[name](shape[1]).to(DEVICE)
        pair = (
            torch.randn(shape, device=DEVICE, requires_grad=True),
            torch.randn(shape).to(DEVICE),
        )
        once(layer, [pair])
        with torch.profiler.profile(activities=kinds) as recorded:
            once(layer, [pair])
        rows += [
            {'layer': name, 'kernel': event.key[:100], 'calls': event.count}
            for event in recorded.key_averages()
        ]
    write(out / 'names.csv', rows)


def write(path: Path, rows: list[dict]) -> None:
    """Replace a table."""
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    print(f'\n{title}')
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for line in (head, *rows):
        print('  '.join(f'{cell:{width}}' for cell, width in zip(line, widths, strict=True)))


def tables(out: Path) -> None:
    """All that was written, and the targets."""
    for name in ('names', 'layers', 'step'):
        path = out / f'{name}.csv'
        if not path.is_file():
            print(f'\n{name}: not measured')
            continue
        with open(path, newline='') as file:
            head, *rows = csv.reader(file)
        show(name if CUDA else f'{name} (on a CPU, which measures nothing)', head, rows)
    path = out / 'layers.csv'
    if not path.is_file():
        return
    with open(path, newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['layer'] == 'SSN undecided']
    print()
    for key in dict.fromkeys((row['dtype'], row['layout']) for row in rows):
        ratios = [float(r['ratio']) for r in rows if (r['dtype'], r['layout']) == key]
        large = [
            float(r['of_copy'])
            for r in rows
            if (r['dtype'], r['layout']) == key and float(r['mb']) >= 64
        ]
        least = f', of copy bandwidth at 64 MB at least {min(large):.2f}' if large else ''
        print(
            f'{" ".join(key)}: SSN undecided / BatchNorm2d, {ON_GPU}: geometric mean '
            f'{geometric_mean(ratios):.3f} (target 1.05), largest {max(ratios):.3f} '
            f'(target 1.4 in float32){least}'
        )


def main() -> None:
    """Parse and run one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('part', choices=['smoke', 'warm', 'layers', 'step', 'names', 'tables'])
    parser.add_argument('out', type=Path, help='folder for all that is written')
    parser.add_argument('--seconds', type=float, default=90, help='of layers and step, about')
    parser.add_argument('--share', default='0/1', help='of warm: 2/8 is the third of 8 shares')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == 'warm':
        warm(args.share)
    elif args.part in ('layers', 'step'):
        {'layers': layers, 'step': step}[args.part](args.out, args.seconds)
    else:
        {'smoke': smoke, 'names': names, 'tables': tables}[args.part](args.out)


if __name__ == '__main__':
    main()
