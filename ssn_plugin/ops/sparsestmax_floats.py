"""SparsestMax of one short vector in Python floats.

For control parameters on the CPU, where reading a value costs nothing: the closed form of
sparsestmax.py takes some thirty operators on tensors of three elements, longer than the whole
normalisation of a small feature map.
"""

import math
from typing import NamedTuple

from ssn_plugin.ops.sparsestmax import _MAX_AMPLIFICATION, _RADIUS_TOLERANCE, circumradius

_LOWEST = -1e300  # instead of the infinite difference of two finite numbers


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
        """Gradient of the vector.

        Args:
            dp: Gradients of the K ratios; those that cannot move are not read.
        """
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


def sparsestmax(z: list[float], radius: float, precision: float) -> Projection:
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
    if radius >= limit * (1 - _RADIUS_TOLERANCE):
        return _face_point(z, gaps, limit, precision, one_hot=True)

    # Where all ratios are positive, as for most of a training, neither order nor faces matter.
    deviation = [gap - mean for gap in gaps]
    distance = math.hypot(*deviation)
    if distance >= radius:
        ratios = [1 / size + value for value in deviation]
        if min(ratios) >= 0:
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
