"""The paper's formulas in plain autograd, slow and literal: what every faster route must equal.

Nothing here is optimised or shared with the fast paths, so that agreement means something. Run it
in float64.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sparsemax(z: Tensor) -> Tensor:
    """Euclidean projection of one vector onto the simplex (Martins and Astudillo, 2016).

    Args:
        z: Shape (K,).

    Returns:
        Shape (K,), non-negative, summing to one.
    """
    ordered, _ = torch.sort(z, descending=True)
    support = 1
    for k in range(1, len(z) + 1):
        if 1 + k * ordered[k - 1] > ordered[:k].sum():
            support = k
    threshold = (ordered[:support].sum() - 1) / support
    return (z - threshold).clamp(min=0)


def sparsestmax(z: Tensor, radius: float) -> Tensor:
    """SparsestMax of one vector without ties, by the recursion of the paper.

    Project onto the simplex; while the point lies inside the circle of ``radius`` around the
    centre, push it out to the circle; where that leaves the simplex, go on in the face of the
    entries that stay positive, with the circle's intersection with that face.

    Args:
        z: Shape (K,), no two entries equal.
        radius: Radius of the circle around (1/K, ..., 1/K).

    Returns:
        Shape (K,).
    """
    size = len(z)
    point = sparsemax(z)
    centre = torch.full_like(z, 1 / size)
    if torch.linalg.vector_norm(point - centre) >= radius:
        return point
    if radius >= math.sqrt((size - 1) / size):
        return torch.nn.functional.one_hot(z.argmax(), size).to(z)
    face = torch.ones(size, dtype=torch.bool)
    while True:
        count = int(face.sum())
        centre = face.to(z) / count
        face_radius = math.sqrt(radius**2 - (1 / count - 1 / size))
        step = torch.where(face, point - centre, torch.zeros_like(z))
        point = centre + face_radius * step / torch.linalg.vector_norm(step)
        if bool((point >= 0).all()):
            return point
        projected = sparsemax(point[face])
        point = torch.zeros_like(z).masked_scatter(face, projected)
        face = point > 0


def normalizer_statistics(
    x: Tensor, normalizer: str, num_groups: int = 32, correction: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean and variance of one normalizer, by definition.

    With ``correction=1`` the instance variance is the unbiased one and the others are built from
    it as in the authors' release: ``mean(var_in + mean_in**2) - mean**2``.

    Args:
        x: Shape (N, C, ...).
        normalizer: 'IN', 'LN', 'BN' or 'GN'.
        num_groups: Groups of 'GN'.
        correction: 0 or 1.

    Returns:
        Two tensors of shape (N, C).
    """
    num, channels = x.shape[:2]
    rows = x.reshape(num, channels, -1)
    mean_in = rows.mean(-1)
    biased = ((rows - mean_in[..., None]) ** 2).mean(-1)
    length = rows.shape[-1]
    # One spatial element has no unbiased variance; it is taken as zero, as its biased one is.
    var_in = biased * (length / (length - 1)) if correction and length > 1 else biased
    square = var_in + mean_in**2
    if normalizer == 'IN':
        return mean_in, var_in
    if normalizer == 'BN':
        mean, second = mean_in.mean(0, keepdim=True), square.mean(0, keepdim=True)
    elif normalizer == 'LN':
        mean, second = mean_in.mean(1, keepdim=True), square.mean(1, keepdim=True)
    elif normalizer == 'GN':
        shape, repeat = (num, num_groups, -1), channels // num_groups
        mean = mean_in.reshape(shape).mean(-1).repeat_interleave(repeat, 1)
        second = square.reshape(shape).mean(-1).repeat_interleave(repeat, 1)
    else:
        raise ValueError(f"normalizer: got {normalizer!r}, expected 'IN', 'LN', 'BN' or 'GN'")
    return mean.expand(num, channels), (second - mean**2).expand(num, channels)


def switchable_norm(
    x: Tensor,
    mean_ratios: Tensor,
    var_ratios: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    normalizers: Sequence[str] = ('IN', 'LN', 'BN'),
    num_groups: int = 32,
    correction: int = 0,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> Tensor:
    """``(x - sum_k p_k mean_k) / sqrt(sum_k p'_k var_k + eps) * weight + bias``.

    Args:
        x: Shape (N, C, ...).
        mean_ratios: Importance ratios p of the means, shape (K,).
        var_ratios: Importance ratios p' of the variances, shape (K,).
        weight: Shape (C,), or None for ones.
        bias: Shape (C,), or None for zeros.
        normalizers: K names.
        num_groups: Groups of 'GN'.
        correction: 0 or 1, see :func:`normalizer_statistics`.
        eps: Added to the mixed variance.
        running_mean: Shape (C,); if given it stands for the batch mean of 'BN'.
        running_var: Shape (C,); if given it stands for the batch variance of 'BN'.

    Returns:
        The shape of ``x``.
    """
    num, channels = x.shape[:2]
    mean = x.new_zeros(num, channels)
    var = x.new_zeros(num, channels)
    for k, normalizer in enumerate(normalizers):
        mean_k, var_k = normalizer_statistics(x, normalizer, num_groups, correction)
        if normalizer == 'BN' and running_mean is not None and running_var is not None:
            mean_k, var_k = running_mean.expand(num, channels), running_var.expand(num, channels)
        mean = mean + mean_ratios[k] * mean_k
        var = var + var_ratios[k] * var_k
    per_row = (num, channels) + (1,) * (x.dim() - 2)
    per_channel = (1, channels) + (1,) * (x.dim() - 2)
    y = (x - mean.reshape(per_row)) / torch.sqrt(var.reshape(per_row) + eps)
    if weight is not None:
        y = y * weight.reshape(per_channel)
    if bias is not None:
        y = y + bias.reshape(per_channel)
    return y
