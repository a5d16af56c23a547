"""SparsestMax: the projection onto the part of the simplex outside a circle, exact for every K.

The closed form is here twice: on tensors of any shape, and for one short vector in Python floats.
A layer on the CPU takes the second: the first needs some thirty operators on tensors of three
elements, which last longer than the whole normalisation of a small feature map. README.md beside
this file derives the closed form and its Jacobian.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ssn_plugin.torch_versions import is_compiling

# A radius this close (relatively) to the circumradius counts as the circumradius: a float32 buffer
# that holds sqrt((K-1)/K) may have been rounded down, and one-hot must mean exactly 1.0 and 0.0.
_RADIUS_TOLERANCE = 2.0**-22

# |dp/dz| on the circle is radius / distance from a tie. It is exact up to this bound, which only
# gaps of a millionth of the radius reach; a smaller gap would overflow instead of informing.
_MAX_AMPLIFICATION = 1e6

# project_floats uses this number where the difference of two finite entries overflows to -inf.
_LOWEST = -1e300


def circumradius(num_candidates: int) -> float:
    """Distance of a vertex of the simplex from its centre, ``sqrt((K - 1) / K)``.

    From this radius on SparsestMax is one-hot.

    Example:
        >>> round(circumradius(3), 4)
        0.8165
    """
    return math.sqrt((num_candidates - 1) / num_candidates)


def is_one_hot_radius(radius: float, num_candidates: int) -> bool:
    """Whether SparsestMax of any vector is one-hot at this radius."""
    return radius >= circumradius(num_candidates) * (1 - _RADIUS_TOLERANCE)


def _project_on_simplex(gaps: Tensor, inside: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Sparsemax of sorted vectors, and its support size, from the gaps to the largest entry."""
    sums = (gaps.unsqueeze(-2) * inside).sum(-1)
    support = (1 + ranks * gaps > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support.to(gaps.dtype)
    return torch.where(ranks <= support, (gaps - threshold).clamp(min=0), 0), support


def _directions(gaps: Tensor, inside: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every support size k: unit direction from the face's centre, distance, and tie or not.

    Args:
        gaps: Sorted entries minus the largest one, shape (..., K).
        inside: Lower triangular mask, shape (K, K): row k - 1 is the support of size k.
        ranks: 1, ..., K.

    Returns:
        Directions (..., K, K), distances (..., K), ties (..., K).
    """
    spread = -gaps  # of the k largest entries: the last one has the largest gap
    tie = spread == 0
    # Relative to the spread, so that neither 1e-30 nor 1e30 loses the direction to rounding.
    scaled = gaps.unsqueeze(-2) / torch.where(tie, 1, spread).unsqueeze(-1) * inside
    deviation = (scaled - (scaled.sum(-1) / ranks).unsqueeze(-1)) * inside
    # A tie is broken toward the entry sorted first: the direction of the vertex it stands for.
    vertex = torch.zeros_like(inside)
    vertex[:, 0] = 1
    toward_first = vertex - inside / ranks.unsqueeze(-1)
    deviation = torch.where(tie.unsqueeze(-1), toward_first, deviation)
    length = deviation.square().sum(-1).sqrt()
    direction = deviation / length.clamp(min=torch.finfo(gaps.dtype).tiny).unsqueeze(-1)
    return direction, length * spread, tie


class _Refusal(torch.autograd.Function):
    """Passes a gradient on, and raises where somebody differentiates it."""

    @staticmethod
    def forward(ctx, gradient: Tensor, switch: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            'sparsestmax: got a second derivative by its control parameters, expected first '
            'derivatives alone: take these parameters out of what is differentiated twice'
        )


def refuse_second_derivative(gradient: Tensor) -> Tensor:
    """Return a gradient by control parameters that raises RuntimeError if it is differentiated.

    Its own graph would miss that the Jacobian depends on the control parameters.
    """
    if not torch.is_grad_enabled() or is_compiling():
        return gradient
    # The second input requires a gradient, so autograd records this call (and can raise in its
    # backward) even where the incoming gradient does not require one.
    return _Refusal.apply(gradient, gradient.new_zeros((), requires_grad=True))


class SparsestMaxFunction(torch.autograd.Function):
    """SparsestMax along the last dimension; see ``functional.sparsestmax``."""

    @staticmethod
    def forward(ctx, z: Tensor, radius: Tensor) -> Tensor:
        """Project ``z`` of shape (..., K); ``radius`` is 0-d, on any device."""
        size = z.shape[-1]
        dtype = torch.promote_types(z.dtype, torch.float32)
        values = z.to(dtype)
        radius = radius.to(device=z.device, dtype=dtype)
        defined = values.isfinite().all(-1, keepdim=True) & ~radius.isnan()
        values = torch.where(defined, values, 0)
        ranks = torch.arange(1, size + 1, device=z.device)
        inside = torch.ones(size, size, dtype=dtype, device=z.device).tril()

        # Descending; among equals the last candidate comes first.
        order = size - 1 - values.flip(-1).argsort(dim=-1, descending=True, stable=True)
        ordered = values.gather(-1, order)
        gaps = (ordered - ordered[..., :1]).clamp(min=-torch.finfo(dtype).max / (4 * size))

        simplex_point, simplex_support = _project_on_simplex(gaps, inside, ranks)
        distance = (simplex_point - 1 / size).square().sum(-1, keepdim=True).sqrt()
        limit = circumradius(size)
        beyond = radius >= limit * (1 - _RADIUS_TOLERANCE)
        # From the circumradius on, never take the sparsemax point: rounding may leave it 1e-17
        # away from its vertex, and the result must be exactly one-hot.
        outside = (distance >= radius) & ~beyond

        # In the face of the k largest entries the circle has radius r_k; the first face, from the
        # largest on, in which the pushed-out point has no negative entry holds the solution.
        inverse_ranks = 1 / ranks.to(dtype)
        farther = inverse_ranks - inverse_ranks[-1]  # squared distance of the faces' centres
        reach = (radius.clamp(0, limit).square() - farther).clamp(min=0).sqrt()
        direction, spread, tie = _directions(gaps, inside, ranks)
        lowest = inverse_ranks + reach * direction.diagonal(dim1=-2, dim2=-1)
        support = torch.where(tie | (lowest >= 0), ranks, 0).amax(-1, keepdim=True)
        support = torch.where(beyond, 1, support)
        face = (support - 1).unsqueeze(-1)
        direction = direction.gather(-2, face.expand(*face.shape[:-1], size)).squeeze(-2)
        reach = reach.expand_as(spread).gather(-1, support - 1)
        circle_point = torch.where(
            ranks <= support, (1 / support.to(dtype) + reach * direction).clamp(min=0), 0
        )

        on_circle = ~(outside | tie.gather(-1, support - 1))
        p = torch.where(outside, simplex_point, circle_point)
        p = torch.where(defined, p, torch.nan).to(z.dtype)
        # (1, 6e-8, 0) is one-hot but for rounding, the more so in half precision.
        p = torch.where(p.amax(-1, keepdim=True) == 1, (p == 1).to(z.dtype), p)
        support = torch.where(outside, simplex_support, support)
        slope = (reach / spread.gather(-1, support - 1)).clamp(max=_MAX_AMPLIFICATION)
        # Two entries on a circle of given radius cannot move at all.
        slope = torch.where(on_circle, torch.where(support == 2, 0, slope), 1)

        inverse = order.argsort(dim=-1)
        ctx.save_for_backward(
            torch.where(on_circle, direction, 0).gather(-1, inverse),
            (ranks <= support).to(dtype).gather(-1, inverse),
            torch.where(defined, slope, torch.nan),
        )
        return p.gather(-1, inverse)

    @staticmethod
    def backward(ctx, dp: Tensor) -> tuple[Tensor, None]:
        """``slope * (I - n n^T)`` on the centred gradient of the support."""
        direction, support, slope = ctx.saved_tensors
        dz = dp.to(support.dtype) * support
        dz = (dz - dz.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)) * support
        dz = dz - direction * (direction * dz).sum(-1, keepdim=True)
        return refuse_second_derivative((slope * dz).to(dp.dtype)), None


# The same for one vector in Python floats


class Projection(NamedTuple):
    """SparsestMax of one vector and its Jacobian, ``slope * (diag(s) - s s^T / k - n n^T)``.

    Attributes:
        ratios: The K ratios.
        support: Indices of the k ones of s.
        direction: The entries of n there, or nothing for zeros.
        slope: At least zero.
    """

    ratios: list[float]
    support: list[int]
    direction: list[float]
    slope: float

    @property
    def moving(self) -> list[int]:
        """Indices of the ratios with a gradient."""
        return self.support if len(self.support) > 1 and self.slope != 0 else []

    def pull_back(self, dp: list[float]) -> list[float]:
        """Gradient of the vector from those of the ratios; only those that move are read."""
        dz = [0.0] * len(self.ratios)
        support = self.moving
        if support:
            mean = sum([dp[k] for k in support]) / len(support)
            centred = [dp[k] - mean for k in support]
            if self.direction:
                pairs = zip(self.direction, centred, strict=True)
                along = sum([n * d for n, d in pairs])
                pairs = zip(self.direction, centred, strict=True)
                centred = [d - along * n for n, d in pairs]
            for k, d in zip(support, centred, strict=True):
                dz[k] = self.slope * d
        return dz


def _snapped(ratios: list[float], precision: float) -> list[float]:
    """Exactly one-hot where the largest rounds to one."""
    top = max(ratios)
    if top < 1 - precision / 4:
        return ratios
    return [1.0 if ratio == top else 0.0 for ratio in ratios]


def project_floats(z: list[float], radius: float, precision: float) -> Projection:
    """Project a vector; see ``functional.sparsestmax``.

    Args:
        z: K numbers, at least 2.
        radius: Any number.
        precision: Machine epsilon of the dtype in which a ratio of one must be exactly one-hot.
    """
    size = len(z)
    top = max(z)
    gaps = [value - top for value in z]
    mean = sum(gaps) / size
    if not math.isfinite(mean) or radius != radius:
        if radius != radius or not all(map(math.isfinite, z)):
            nan = [math.nan] * size
            return Projection(nan, list(range(size)), nan, math.nan)
        gaps = [max(gap, _LOWEST) for gap in gaps]
        mean = sum(gaps) / size
    limit = circumradius(size)
    if is_one_hot_radius(radius, size):
        return _face_point(z, gaps, limit, precision, one_hot=True)

    # Where all ratios are positive, as for most of a training, neither order nor faces matter.
    deviation = [gap - mean for gap in gaps]
    distance = math.hypot(*deviation)
    if distance >= radius:
        ratios = [1 / size + value for value in deviation]
        if min(ratios) > 0:
            return Projection(_snapped(ratios, precision), list(range(size)), [], 1.0)
    elif distance > 0:
        direction = [value / distance for value in deviation]
        ratios = [1 / size + radius * value for value in direction]
        if min(ratios) >= 0:
            # Two entries on a circle of given radius cannot move at all.
            slope = 0.0 if size == 2 else min(radius / distance, _MAX_AMPLIFICATION)
            support = list(range(size))
            return Projection(_snapped(ratios, precision), support, direction, slope)
    return _face_point(z, gaps, max(radius, 0.0), precision, one_hot=False)


def _face_point(
    z: list[float], gaps: list[float], radius: float, precision: float, one_hot: bool
) -> Projection:
    """The projection where some ratios are zero, or all entries are equal."""
    size = len(z)
    # Descending; among equals the last candidate comes first.
    order = sorted(range(size), key=lambda k: (z[k], k), reverse=True)
    gaps = [gaps[k] for k in order]
    # Sparsemax.
    total = threshold = 0.0
    support = 0
    for gap in gaps:
        total += gap
        if 1 + (support + 1) * gap <= total:
            break
        support += 1
        threshold = (total - 1) / support
    point = [max(gap - threshold, 0.0) for gap in gaps[:support]]
    direction, slope = [], 1.0
    squared_distance = sum([(p - 1 / size) ** 2 for p in point]) + (size - support) / size**2
    if one_hot or squared_distance < radius**2:
        support = 1 if one_hot else size
        point, direction, slope = _circle_point(gaps, support, radius)
        while point[-1] < 0:
            support -= 1
            point, direction, slope = _circle_point(gaps, support, radius)
    order = order[: len(point)]
    ratios = [0.0] * size
    for k, value in zip(order, point, strict=True):
        ratios[k] = value
    return Projection(_snapped(ratios, precision), order, direction, slope)


def _circle_point(
    gaps: list[float], count: int, radius: float
) -> tuple[list[float], list[float], float]:
    """Best point of the circle in the face of the first entries, its direction and the slope."""
    centre = 1 / count
    reach = math.sqrt(max(radius**2 - (centre - 1 / len(gaps)), 0.0))
    spread = -gaps[count - 1]
    if spread == 0:
        # A tie is broken toward the entry sorted first.
        length = math.sqrt(1 - centre)
        others = max(centre - reach * centre / length, 0.0) if count > 1 else 0.0
        return [centre + reach * length] + [others] * (count - 1), [], 1.0
    # Relative to the spread, so that no gap is too small for a direction.
    scaled = [gap / spread for gap in gaps[:count]]
    mean = sum(scaled) / count
    scaled = [value - mean for value in scaled]
    length = math.hypot(*scaled)
    direction = [value / length for value in scaled]
    # Two entries on a circle of given radius cannot move at all.
    slope = 0.0 if count == 2 else min(reach / (length * spread), _MAX_AMPLIFICATION)
    return [centre + reach * value for value in direction], direction, slope
