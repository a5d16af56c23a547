"""A ResNet with SSN or SN as the authors describe it: plain loops, float64, nothing of the package.

Keys are those of the released files. IN variances are unbiased, LN and BN statistics come from the
IN moments, the stem pools without padding, the stride is on the 3x3 convolution.
"""

import functools
import math
from collections.abc import Callable, Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def _on_simplex(z: tuple[float, ...]) -> list[float]:
    """The nearest point of the simplex: the nearest of the feasible projections onto its faces."""
    best, best_distance = None, math.inf
    for size in range(1, len(z) + 1):
        for face in combinations(range(len(z)), size):
            shift = (1 - sum(z[k] for k in face)) / size
            point = [z[k] + shift if k in face else 0.0 for k in range(len(z))]
            distance = sum((a - b) ** 2 for a, b in zip(point, z, strict=True))
            if min(point) >= 0 and distance < best_distance:
                best, best_distance = point, distance
    return best


@functools.cache
def sparsestmax(z: tuple[float, float, float], radius: float) -> list[float]:
    """SparsestMax of three numbers by its definition, searched for on the circle.

    It is the nearest point of the simplex that is at least ``radius`` from the centre.
    """
    point = _on_simplex(z)
    if math.dist(point, [1 / 3] * 3) >= radius:
        return point
    if radius >= math.sqrt(2 / 3):
        return [float(k == max(range(3), key=lambda i: z[i])) for k in range(3)]

    def on_circle(angle: float) -> list[float]:
        a, b = math.cos(angle) / math.sqrt(2), math.sin(angle) / math.sqrt(6)
        return [1 / 3 + radius * (a + b), 1 / 3 + radius * (b - a), 1 / 3 - 2 * radius * b]

    # On a circle around the centre the nearest point is the one of the largest product with z.
    def product(angle: float) -> float:
        return sum(p * x for p, x in zip(on_circle(angle), z, strict=True))

    def slope(angle: float) -> float:
        a, b = -math.sin(angle) / math.sqrt(2), math.cos(angle) / math.sqrt(6)
        return (a + b) * z[0] + (b - a) * z[1] - 2 * b * z[2]

    step = 2 * math.pi / 720
    angles = [k * step for k in range(720) if min(on_circle(k * step)) >= 0]
    start = max(angles, key=product)
    sign = 1 if slope(start) > 0 else -1
    inside, outside = start, start + sign * step
    for _ in range(60):
        middle = (inside + outside) / 2
        better = min(on_circle(middle)) >= 0 and sign * slope(middle) > 0
        inside, outside = (middle, outside) if better else (inside, middle)
    return on_circle(inside)


def ssn_ratios(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Importance ratios of mean and variance of an SSN layer of a file."""
    return tuple(
        control
        if int(state[f'{name}.{statistic}_fixed'])
        else torch.tensor(
            sparsestmax(tuple(control.tolist()), float(state[f'{name}.radius'])),
            dtype=torch.float64,
        )
        for statistic in ('mean', 'var')
        for control in [state[f'{name}.{statistic}_weight'].double()]
    )


def sn_ratios(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Importance ratios of mean and variance of an SN layer of a file."""
    controls = (state[f'{name}.{statistic}_weight'].double() for statistic in ('mean', 'var'))
    return tuple(control.exp() / control.exp().sum() for control in controls)


class PlainResNet:
    """Features of the four stages of a released network.

    Args:
        state: State dict of a released file, without ``module.``.
        ratios: ``ssn_ratios`` or ``sn_ratios``.
        training: Whether BN takes the statistics of the batch; then ``running`` holds the running
            statistics after it.
        momentum: Weight of the new value in the running statistics.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        ratios: Callable = ssn_ratios,
        training: bool = False,
        momentum: float = 0.003,
    ) -> None:
        self.state = {key: value.double() for key, value in state.items()}
        self.ratios = ratios
        self.training = training
        self.momentum = momentum
        self.running: dict[str, Tensor] = {}

    def __call__(self, x: Tensor) -> list[Tensor]:
        x = self.conv(x.double(), 'conv1', stride=2)
        x = F.max_pool2d(F.relu(self.norm(x, 'sn1')), 3, stride=2, padding=0, ceil_mode=True)
        outputs = []
        for stage in range(1, 5):
            block = 0
            while f'layer{stage}.{block}.conv1.weight' in self.state:
                x = self.block(x, f'layer{stage}.{block}', 2 if stage > 1 and block == 0 else 1)
                block += 1
            outputs.append(x)
        return outputs

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f'{name}.weight']
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def block(self, x: Tensor, name: str, stride: int) -> Tensor:
        bottleneck = f'{name}.conv3.weight' in self.state
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        y = x
        for i, conv_stride in enumerate(strides, start=1):
            y = self.norm(self.conv(y, f'{name}.conv{i}', conv_stride), f'{name}.sn{i}')
            y = F.relu(y) if i < len(strides) else y
        if f'{name}.downsample.0.weight' in self.state:
            x = self.norm(self.conv(x, f'{name}.downsample.0', stride), f'{name}.downsample.1')
        return F.relu(x + y)

    def norm(self, x: Tensor, name: str) -> Tensor:
        count, channels, height, width = x.shape
        mean_in = x.sum((2, 3)) / (height * width)
        var_in = ((x - mean_in[:, :, None, None]) ** 2).sum((2, 3)) / (height * width - 1)
        square = var_in + mean_in**2
        mean_ln = mean_in.mean(1, keepdim=True)
        means = [mean_in, mean_ln]
        variances = [var_in, square.mean(1, keepdim=True) - mean_ln**2]
        if f'{name}.running_mean' in self.state:
            mean_bn = self.state[f'{name}.running_mean'].reshape(1, -1)
            var_bn = self.state[f'{name}.running_var'].reshape(1, -1)
            if self.training:
                old_mean, old_var = mean_bn, var_bn
                mean_bn = mean_in.mean(0, keepdim=True)
                var_bn = square.mean(0, keepdim=True) - mean_bn**2
                new = self.momentum
                self.running[f'{name}.running_mean'] = (1 - new) * old_mean + new * mean_bn
                self.running[f'{name}.running_var'] = (1 - new) * old_var + new * var_bn
            means.append(mean_bn)
            variances.append(var_bn)
        mean_ratios, var_ratios = self.ratios(self.state, name)
        mean = sum(p * m.expand(count, channels) for p, m in zip(mean_ratios, means, strict=True))
        var = sum(p * v.expand(count, channels) for p, v in zip(var_ratios, variances, strict=True))
        y = (x - mean[:, :, None, None]) / torch.sqrt(var[:, :, None, None] + EPS)
        weight, bias = (
            self.state[f'{name}.{key}'].reshape(1, -1, 1, 1) for key in ('weight', 'bias')
        )
        return y * weight + bias


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value of the tensor that is right."""
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())
