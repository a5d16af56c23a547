"""SparsestMax: the projection onto the part of the simplex outside a circle, exact for every K.

The derivation of the closed form and of its Jacobian is in README.md beside this file.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A radius this close (relatively) to the circumradius counts as the circumradius: a float32 buffer
# that holds sqrt((K-1)/K) may have been rounded down, and one-hot must mean exactly 1.0 and 0.0.
_RADIUS_TOLERANCE = 2.0**-22

# |dp/dz| on the circle is radius / distance from a tie. It is exact up to this bound, which only
# gaps of a millionth of the radius reach; a smaller gap would overflow instead of informing.
_MAX_AMPLIFICATION = 1e6


def circumradius(num_candidates: int) -> float:
    """Distance of a vertex of the simplex from its centre, ``sqrt((K - 1) / K)``.

    From this radius on SparsestMax is one-hot.

    Args:
        num_candidates: K, at least 2.

    Example:
        >>> round(circumradius(3), 4)
        0.8165
    """
    return math.sqrt((num_candidates - 1) / num_candidates)


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


class SparsestMaxFunction(torch.autograd.Function):
    """SparsestMax along the last dimension; see ``functional.sparsestmax``."""

    @staticmethod
    def forward(ctx, z: Tensor, radius: Tensor) -> Tensor:
        """Project ``z``.

        Args:
            ctx: Autograd context.
            z: Shape (..., K), floating point.
            radius: 0-d, on any device.

        Returns:
            Shape (..., K), in the dtype of ``z``.
        """
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
        # A sparsemax point that rounding keeps off its vertex by 1e-17 is not one-hot yet.
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
    @once_differentiable
    def backward(ctx, dp: Tensor) -> tuple[Tensor, None]:
        """``slope * (I - n n^T)`` on the centred gradient of the support.

        Args:
            ctx: Autograd context.
            dp: Shape (..., K).

        Returns:
            Gradient of ``z``, and None for the radius.
        """
        direction, support, slope = ctx.saved_tensors
        dz = dp.to(support.dtype) * support
        dz = (dz - dz.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)) * support
        dz = dz - direction * (direction * dz).sum(-1, keepdim=True)
        return (slope * dz).to(dp.dtype), None
