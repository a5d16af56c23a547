"""SyncSSN: SSN whose BN statistics are those of all processes."""

import torch
import torch.distributed as dist

from ssn_plugin.layers.ssn import SSN


class _Handle:
    """A process group that copies share and files leave out."""

    def __init__(self, group: 'dist.ProcessGroup | None') -> None:
        self.group = group

    def __deepcopy__(self, memo: dict) -> '_Handle':
        return self

    def __reduce__(self) -> tuple:
        return _Handle, (None,)


class SyncSSN(SSN):
    r"""SSN whose 'BN' takes its statistics over the batches of all processes.

    .. math::
        \mu_{BN} = \frac{1}{T} \sum_i x_i, \qquad
        \sigma_{BN}^2 = \frac{1}{T} \sum_i (x_i - \mu_{BN})^2

    per channel, over the T elements of all processes together, which may hold different numbers of
    images, images of different sizes, or none at all. Everything else is as in :class:`SSN`: the
    instance and layer statistics are each image's own. Gradients are those of the joined batch, and
    the running statistics of all processes are equal, to the bit.

    A training step costs one all-reduce of 2 C + 1 numbers forward and one of 2 C backward, and
    nothing any more once mean and variance are decided for others than 'BN'. In evaluation, without
    an initialised process group and in a group of one process this is SSN.

    Every process of the group must run the layer in the same order in its forward pass, and in its
    backward pass too: with an empty batch the loss must still depend on the output, if only by
    ``y.sum() * 0``.

    Args:
        num_features: C, the number of channels of (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W).
        eps: Added to the mixed variance.
        momentum: Weight of the new value in the running statistics; None is the cumulative average.
        affine: Whether to learn ``weight`` and ``bias``.
        track_running_stats: Whether 'BN' keeps running statistics for evaluation.
        normalizers: Candidates out of 'IN', 'LN', 'BN', 'GN'.
        num_groups: Groups of 'GN': the largest divisor of C up to it.
        correction: 0 for the paper's variances, 1 for those of the authors' release.
        radius: Initial radius of the circle.
        process_group: The processes; None is all of them. Copies share it; a file does not hold it.
        device: Of parameters and buffers.
        dtype: Of parameters and running statistics.

    Raises:
        ValueError: If an argument is out of its range, or in training if this process is not part
            of ``process_group``.

    Example:
        >>> import torch
        >>> from ssn_plugin import SyncSSN
        >>> layer = SyncSSN(8)  # under torchrun the layers of all processes share statistics
        >>> layer(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        normalizers: tuple[str, ...] = ('IN', 'LN', 'BN'),
        num_groups: int = 32,
        correction: int = 0,
        radius: float = 0.0,
        process_group: 'dist.ProcessGroup | None' = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            normalizers,
            num_groups,
            correction,
            radius,
            device,
            dtype,
        )
        self.process_group = process_group

    @property
    def process_group(self) -> 'dist.ProcessGroup | None':
        """The processes; None is all of them."""
        return self._handle.group

    @process_group.setter
    def process_group(self, group: 'dist.ProcessGroup | None') -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise ValueError(f'process_group: got {group!r}, expected a ProcessGroup or None')
        self._handle = _Handle(group)

    @property
    def _group(self) -> 'dist.ProcessGroup | None':
        if not self.training or 'BN' not in self.normalizers:
            return None
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = self.process_group or dist.group.WORLD
        size = dist.get_world_size(group)
        if size < 1:
            raise ValueError(
                f'process_group: got one without this process (rank {dist.get_rank()}), expected '
                'one with it'
            )
        return group if size > 1 else None
