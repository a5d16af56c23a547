"""SSNRatioHook: the radius, the number of decided layers and the importance ratios in the log."""

from mmengine.hooks import Hook
from torch import nn

from ssn_plugin.analysis.importance_ratios import importance_ratios
from ssn_plugin.engine.model_wrapper import unwrapped


class SSNRatioHook(Hook):
    """Log what the SSN and SN layers of a model currently choose.

    Every ``interval`` iterations, and after the last one:

    - to the log, which also hands it to the visualizer: ``ssn_radius``, the largest of the model;
      ``ssn_decided``, the number of layers whose mean and variance ratios are both one-hot;
      ``ssn_IN``, ``ssn_LN``, ...: importance ratio averaged over layers and both statistics;
    - to the visualizer, TensorBoard for one: ``ssn/<layer>/mean/<normalizer>`` and
      ``ssn/<layer>/var/<normalizer>``, the ratios layer by layer.

    It costs one synchronisation with the device per interval.

    Args:
        interval: Iterations between two records.

    Raises:
        ValueError: If ``interval`` is no positive integer.

    Example:
        >>> custom_hooks = [dict(type='SSNRatioHook', interval=50)]  # in a config
    """

    # Before LoggerHook, which prints what is recorded here.
    priority = 'NORMAL'

    def __init__(self, interval: int = 10) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval: got {interval!r}, expected a positive integer')
        self.interval = interval

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Record.

        Args:
            runner: mmengine's Runner.
            batch_idx: Unused.
            data_batch: Unused.
            outputs: Unused.
        """
        last = runner.iter + 1 == runner.max_iters
        if not (self.every_n_train_iters(runner, self.interval) or last):
            return
        summary, per_layer = importance_scalars(unwrapped(runner.model))
        for name, value in summary.items():
            runner.message_hub.update_scalar(f'train/{name}', value)
        runner.visualizer.add_scalars(per_layer, step=runner.iter + 1)


def importance_scalars(model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    """Radius, decided layers and ratios of a model as named numbers.

    Args:
        model: Any module.

    Returns:
        The summary over all layers, and the ratios layer by layer.
    """
    rows = importance_ratios(model)
    if not rows:
        return {}, {}
    per_layer: dict[str, float] = {}
    by_normalizer: dict[str, list[float]] = {}
    for row in rows:
        for statistic, ratios in (('mean', row.mean_ratios), ('var', row.var_ratios)):
            for normalizer, ratio in zip(row.normalizers, ratios, strict=True):
                per_layer[f'ssn/{row.layer}/{statistic}/{normalizer}'] = ratio
                by_normalizer.setdefault(normalizer, []).append(ratio)
    radii = {row.layer: row.radius for row in rows if row.radius is not None}
    # A frozen stage keeps the radius of its pretraining, which is that of no schedule here.
    scheduled = [r for n, r in radii.items() if model.get_submodule(n).mean_weight.requires_grad]
    summary = {
        'ssn_radius': max(scheduled or radii.values(), default=0.0),
        'ssn_decided': float(sum(row.decided for row in rows)),
    }
    summary |= {f'ssn_{n}': sum(ratios) / len(ratios) for n, ratios in by_normalizer.items()}
    return summary, per_layer
