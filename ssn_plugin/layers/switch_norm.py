"""SN: the softmax parent of SSN, as a baseline."""

from ssn_plugin.layers.switchable import SwitchableNorm


class SN(SwitchableNorm):
    r"""Switchable Normalization: importance ratios are the softmax of the control parameters.

    .. math::
        y = \frac{x - \sum_k p_k \mu_k}{\sqrt{\sum_k p'_k \sigma_k^2 + \epsilon}}
        \cdot \mathrm{weight} + \mathrm{bias}

    with the importance ratios

    .. math::
        p = \mathrm{softmax}(\mathrm{mean\_weight}),\qquad
        p' = \mathrm{softmax}(\mathrm{var\_weight})

    Args:
        num_features: C, the number of channels of (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W).
        eps: Added to the mixed variance.
        momentum: Weight of the new value in the running statistics; None is the cumulative average.
        affine: Whether to learn ``weight`` and ``bias``.
        track_running_stats: Whether 'BN' keeps running statistics for evaluation.
        normalizers: Candidates. ``('IN', 'LN')`` is the SN without BN of the authors' release.
        num_groups: Groups of 'GN': the largest divisor of C up to it.
        correction: 0 for the paper's variances, 1 for those of the authors' release.
        device: Of parameters and buffers.
        dtype: Of parameters and running statistics.

    Raises:
        ValueError: If an argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> from ssn_plugin import SN
        >>> layer = SN(8)
        >>> layer(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
        >>> layer.mean_ratios
        tensor([0.3333, 0.3333, 0.3333])

    Source:
        Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", ICLR 2019.
    """
