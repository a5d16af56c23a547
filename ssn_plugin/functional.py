"""The public functions: ``sparsestmax`` and ``switchable_norm``, with their validation."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from ssn_plugin.ops.sparsestmax import SparsestMaxFunction
from ssn_plugin.ops.switchable_norm import dispatch
from ssn_plugin.ops.switchable_norm.ratios import Control
from ssn_plugin.ops.switchable_norm.statistics import (
    NORMALIZERS,
    BatchStatistics,
    Moments,
    Settings,
)


def check_not_negative(number: float, name: str) -> float:
    """Return ``number`` as a float, or raise ValueError if it is negative, NaN or no number."""
    if isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0:
        raise ValueError(f'{name}: got {number!r}, expected a number of at least 0')
    return float(number)


def check_positive(number: int, name: str) -> None:
    """Raise ValueError if ``number`` is no positive integer."""
    if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
        raise ValueError(f'{name}: got {number!r}, expected a positive integer')


def sparsestmax(z: Tensor, radius: float | Tensor, dim: int = -1) -> Tensor:
    r"""Project onto the part of the simplex outside a circle: sparse ratios, one-hot in the end.

    .. math::
        \mathrm{SparsestMax}(z; r) = \arg\min_p \lVert p - z \rVert_2
        \quad \text{s.t.} \quad p \ge 0,\ \sum_k p_k = 1,\ \lVert p - u \rVert_2 \ge r

    with the centre :math:`u = (1/K, ..., 1/K)`. A radius of 0 or less is sparsemax; from the
    circumradius :math:`\sqrt{(K-1)/K}` on, p is exactly one-hot (1.0 and 0.0).

    The minimiser is not unique where the largest entries are equal, the circle binds and only those
    entries stay positive. Then ties break toward the last of the equal candidates (BN in the
    layer): p moves from the centre of the tied entries straight toward its vertex. The gradient at
    an exact tie is that of sparsemax, dz = dp - mean(dp) over the tied entries. Elsewhere it is the
    exact Jacobian, whose norm grows as radius / distance from the tie, up to 1e6. A second
    derivative raises RuntimeError.

    Args:
        z: Shape (..., K, ...) with K >= 2 entries along ``dim``. float16 and bfloat16 are computed
            in float32. Where a vector holds NaN or inf, its p is NaN.
        radius: In the units of p, without gradient. A 0-d tensor on the device of ``z`` is never
            read by the CPU; NaN in it makes p NaN.
        dim: The dimension of the vectors.

    Returns:
        The shape and dtype of ``z``.

    Raises:
        ValueError: If ``z`` is not a floating-point tensor with at least 2 entries along ``dim``,
            or ``radius`` is NaN or a tensor with more than one element.
        IndexError: If ``dim`` is out of range.

    Example:
        >>> import torch
        >>> from ssn_plugin import sparsestmax
        >>> z = torch.tensor([0.6, 0.4, -0.3])
        >>> sparsestmax(z, 0.0)
        tensor([0.6000, 0.4000, 0.0000])
        >>> sparsestmax(z, 0.5)
        tensor([0.7041, 0.2959, 0.0000])
        >>> sparsestmax(z, 0.8165)
        tensor([1., 0., 0.])

    Source:
        Shao et al., "SSN: Learning Sparse Switchable Normalization via SparsestMax", IJCV 2020.
    """
    if not isinstance(z, Tensor) or not z.is_floating_point():
        kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f'z: got {kind}, expected a floating-point tensor')
    if z.dim() and not -z.dim() <= dim < z.dim():
        raise IndexError(f'dim: got {dim}, out of range for z of shape {tuple(z.shape)}')
    if z.dim() == 0 or z.shape[dim] < 2:
        raise ValueError(
            f'z: got shape {tuple(z.shape)}, expected at least 2 entries along dim={dim}'
        )
    if isinstance(radius, Tensor):
        if radius.numel() != 1:
            raise ValueError(
                f'radius: got a tensor of shape {tuple(radius.shape)}, expected one element'
            )
        radius = radius.reshape(())
    else:
        if isinstance(radius, bool) or not isinstance(radius, int | float) or math.isnan(radius):
            raise ValueError(f'radius: got {radius!r}, expected a number or a 0-d tensor')
        # Filled on the device: a copy from the CPU would wait. Beyond 1 all radii are alike.
        dtype = torch.promote_types(z.dtype, torch.float32)
        radius = torch.full((), min(max(radius, 0.0), 1.0), dtype=dtype, device=z.device)
    return SparsestMaxFunction.apply(z.movedim(dim, -1), radius).movedim(-1, dim)


def check_layer(num_features: int, eps: float, momentum: float | None, correction: int) -> None:
    """Raise ValueError if an argument that all layers have is out of its range."""
    check_positive(num_features, 'num_features')
    if not isinstance(eps, Real) or not eps >= 0:
        raise ValueError(f'eps: got {eps!r}, expected a number of at least 0')
    if momentum is not None and not (isinstance(momentum, Real) and 0 <= momentum <= 1):
        raise ValueError(f'momentum: got {momentum!r}, expected None or a number in [0, 1]')
    if not isinstance(correction, Integral) or correction not in (0, 1):
        raise ValueError(f'correction: got {correction!r}, expected 0 or 1')


def groups_of(num_groups: int, num_features: int) -> int:
    """The largest divisor of the channels up to ``num_groups``, or raise ValueError naming that.

    Networks have layers of 48 channels and of a prime number of classes, too.
    """
    check_positive(num_groups, 'num_groups')
    at_most = range(min(num_groups, max(num_features, 1)), 0, -1)
    return next(groups for groups in at_most if num_features % groups == 0)


def check_normalizers(normalizers: Sequence[str]) -> tuple[str, ...]:
    """Return the candidates as a tuple, or raise ValueError naming what is wrong with them."""
    known = ', '.join(NORMALIZERS)
    listed = isinstance(normalizers, list | tuple)
    if not listed or any(name not in NORMALIZERS for name in normalizers):
        raise ValueError(f'normalizers: got {normalizers!r}, expected names out of {known}')
    if len(normalizers) < 2 or len(set(normalizers)) < len(normalizers):
        raise ValueError(
            f'normalizers: got {tuple(normalizers)!r}, expected at least 2 different names'
        )
    return tuple(normalizers)


def switchable_norm(
    x: Tensor,
    mean_ratios: Tensor,
    var_ratios: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    normalizers: Sequence[str] = ('IN', 'LN', 'BN'),
    num_groups: int = 32,
    correction: int = 0,
) -> Tensor:
    r"""Normalise with a mixture of the statistics of several normalizers.

    .. math::
        y = \frac{x - \sum_k p_k \mu_k}{\sqrt{\sum_k p'_k \sigma_k^2 + \epsilon}}
        \cdot \mathrm{weight} + \mathrm{bias}

    over the candidates k. One read of x gives the instance moments, from which all others follow.

    Args:
        x: Shape (N, C, ...) with any number of spatial dimensions. Statistics of float16 and
            bfloat16 are computed in float32. An empty x comes back empty.
        mean_ratios: Importance ratios p, shape (K,).
        var_ratios: Importance ratios p', shape (K,).
        weight: Shape (C,), or None for ones.
        bias: Shape (C,), or None for zeros.
        running_mean: Shape (C,), or None. Updated in place if ``training``, else used as the mean
            of 'BN'. Without it 'BN' uses the statistics of the batch.
        running_var: Shape (C,), or None. As ``running_mean``; the update uses the unbiased batch
            variance, as ``torch.nn.functional.batch_norm`` does, or with ``correction=1`` the
            variance that normalises.
        training: Whether 'BN' uses the statistics of the batch.
        momentum: Weight of the new value in the running statistics.
        eps: Added to the mixed variance.
        normalizers: K names out of 'IN', 'LN', 'BN', 'GN'.
        num_groups: Groups of 'GN': the largest divisor of C up to it.
        correction: Divisor of the instance variance is H*W - correction. 0 is the paper's; 1 is
            what the authors' release computes, for weights trained with it.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        ValueError: If ``x`` has less than 2 dimensions or is not floating-point, ratios are not
            (K,), a name is unknown, only one of the running statistics is given, ``num_groups`` is
            no positive integer, or ``correction`` is not 0 or 1.

    Example:
        >>> import torch
        >>> from ssn_plugin import switchable_norm
        >>> x = torch.randn(4, 8, 5, 5)
        >>> only_bn = torch.tensor([0., 0., 1.])
        >>> y = switchable_norm(x, only_bn, only_bn)
        >>> bn = torch.nn.functional.batch_norm(x, None, None, training=True)
        >>> torch.allclose(y, bn, atol=1e-5)
        True

    Source:
        Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", ICLR 2019.
    """
    if x.dim() < 2:
        raise ValueError(f'x: got shape {tuple(x.shape)}, expected (N, C, ...)')
    if not x.is_floating_point():
        raise ValueError(f'x: got {x.dtype}, expected a floating-point tensor')
    if (running_mean is None) != (running_var is None):
        name = 'running_mean' if running_mean is None else 'running_var'
        raise ValueError(f'{name}: got None, expected both running statistics or neither')
    normalizers = check_normalizers(normalizers)
    num_groups = groups_of(num_groups, x.shape[1])
    for name, ratios in (('mean_ratios', mean_ratios), ('var_ratios', var_ratios)):
        if ratios.shape != (len(normalizers),):
            raise ValueError(
                f'{name}: got shape {tuple(ratios.shape)}, expected ({len(normalizers)},)'
            )
    for name, vector in (
        ('weight', weight),
        ('bias', bias),
        ('running_mean', running_mean),
        ('running_var', running_var),
    ):
        if vector is not None and vector.shape != (x.shape[1],):
            raise ValueError(f'{name}: got shape {tuple(vector.shape)}, expected ({x.shape[1]},)')
    if not isinstance(correction, Integral) or correction not in (0, 1):
        raise ValueError(f'correction: got {correction!r}, expected 0 or 1')
    running = None if running_mean is None else Moments(running_mean, running_var)
    batch = (
        BatchStatistics(tracked=running, momentum=momentum)
        if training
        else BatchStatistics(given=running)
    )
    return dispatch.switchable_norm(
        x,
        Control(mean_ratios, var_ratios, 'given'),
        weight,
        bias,
        batch,
        Settings(normalizers, num_groups, correction, eps),
    )
