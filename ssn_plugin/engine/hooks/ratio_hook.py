"""SSNRatioHook: radius, decided layers and importance ratios in the log, in a file, in pictures."""

import math
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook, LoggerHook
from torch import nn

from ssn_plugin.analysis.history import (
    HISTORY_FILE,
    HistoryError,
    append_to_history,
    read_history,
    start_history,
)
from ssn_plugin.analysis.layer_ratios import STATISTICS, LayerRatios, layer_ratios
from ssn_plugin.engine.model_wrapper import unwrapped
from ssn_plugin.engine.progress import ended_early, is_last_iteration, iterations_in_all
from ssn_plugin.engine.versions import versions
from ssn_plugin.engine.visualizer import tolerate_full_disk
from ssn_plugin.errors import in_one_line
from ssn_plugin.functional import check_positive

_RUN = 'ssn_run'  # entry of mmengine's message hub, which checkpoints keep


class SSNRatioHook(Hook):
    """Log what the SSN and SN layers of a model currently choose.

    Every ``interval`` iterations, and after the last one:

    - to the log, which also hands it to the visualizer: ``ssn_radius``, the largest of the model;
      ``ssn_decided``, the number of layers whose mean and variance ratios are both one-hot;
      ``ssn_IN``, ``ssn_LN``, ...: importance ratio averaged over all layers and both statistics,
      which sum to 1. Every line of the log has the values of its own iteration;
    - to the visualizer, TensorBoard for one: ``ssn/<layer>/mean/<normalizer>`` and
      ``ssn/<layer>/var/<normalizer>``, the ratios layer by layer;
    - to ``ratios.jsonl`` in the work dir: one line with all of it
      (:mod:`ssn_plugin.analysis.history`). A resumed run goes on with its lines; another run in the
      same work dir begins a part of its own.

    The first layer whose ratios are NaN is one warning. So is a log or a visualizer that cannot be
    written, on a full disk for one: the training goes on without it until a checkpoint cannot be
    written either.

    It costs one synchronisation with the device per interval and per line of the log. After the
    training, the visualizer gets the figures, and the work dir a ``report.html``
    (:func:`ssn_plugin.analysis.run_report.write_run_report`); what fails there is one warning.

    Args:
        interval: Iterations between two records.
        report: Whether to draw at the end.

    Raises:
        ValueError: If ``interval`` is no positive integer.

    Example:
        >>> custom_hooks = [dict(type='SSNRatioHook', interval=50)]  # in a config
    """

    # Before LoggerHook, which prints what is recorded here.
    priority = 'NORMAL'

    def __init__(self, interval: int = 10, report: bool = True) -> None:
        check_positive(interval, 'interval')
        self.interval = interval
        self.report = report
        self._history: Path | None = None
        self._run: str | None = None
        self._lost = False
        self._recorded = 0  # iterations, at the last record

    def before_train(self, runner) -> None:
        """Begin ``ratios.jsonl``, or go on with it."""
        tolerate_full_disk(runner.visualizer, runner.logger)
        rows = layer_ratios(unwrapped(runner.model))
        if not rows or not is_main_process():
            return
        path = Path(runner.work_dir) / HISTORY_FILE
        about = dict(max_iters=iterations_in_all(runner), versions=versions())
        run = runner.message_hub.runtime_info.get(_RUN)
        try:
            self._run = start_history(path, rows, about, runner.iter, run)
            earlier = len(read_history(path, self._run).runs) - 1
        except (OSError, HistoryError) as error:
            runner.logger.warning(f'SSNRatioHook: cannot write {path}: {error}')
            return
        self._history = path
        runner.message_hub.update_info(_RUN, self._run)  # a resumed run knows it from here
        if earlier:
            runner.logger.info(
                f'SSNRatioHook: {path} has {earlier} other runs; this one is {self._run} in it'
            )

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Record."""
        last = is_last_iteration(runner, batch_idx)
        recorded = self.every_n_train_iters(runner, self.interval) or last
        if recorded or _is_logged(runner, batch_idx):
            self._record(runner, runner.iter + 1, recorded)

    def _record(self, runner, iteration: int, recorded: bool) -> None:
        """To the log; to the file and the visualizer too if ``recorded``."""
        model = unwrapped(runner.model)
        rows = layer_ratios(model)
        self._say_where_ratios_are_lost(runner, iteration, rows)
        summary, per_layer = importance_scalars(model, rows)
        for name, value in summary.items():
            runner.message_hub.update_scalar(f'train/{name}', value)
        if not recorded:
            return
        self._recorded = iteration
        runner.visualizer.add_scalars(per_layer, step=iteration)
        if self._history is None:
            return
        radius, loss = summary['ssn_radius'], self._loss(runner)
        try:
            append_to_history(self._history, iteration, rows, radius, loss, self._run)
        except OSError as error:
            runner.logger.warning(
                f'SSNRatioHook: cannot write {self._history} any more, so it stops doing so: '
                f'{error}'
            )
            self._history = None

    def after_train(self, runner) -> None:
        """Record where the run was ended before its last iteration, then draw."""
        if ended_early(runner) and self._recorded != runner.iter:
            self._record(runner, runner.iter, recorded=True)
        if not self.report or self._history is None:
            return
        try:
            # Imported here, so that a training without figures needs no matplotlib.
            from ssn_plugin.analysis.run_report import figure_images, write_run_report

            work_dir = Path(runner.work_dir)
            for name, image in figure_images(work_dir):
                runner.visualizer.add_image(name, image, step=runner.iter)
            path = write_run_report(work_dir, runner.cfg)
        except Exception as error:
            # No error of the report may end the program: the training is done and worth more.
            runner.logger.warning(
                f'SSNRatioHook: no report of {runner.work_dir}: {in_one_line(error)}'
            )
        else:
            runner.logger.info(f'SSNRatioHook: the report is {path}')

    def _say_where_ratios_are_lost(self, runner, iteration: int, rows: list[LayerRatios]) -> None:
        lost = [row.layer for row in rows if not _is_finite(row)]
        if not lost or self._lost:
            return
        self._lost = True
        more = f' and {len(lost) - 1} more layers' if lost[1:] else ''
        runner.logger.warning(
            f'SSNRatioHook: the importance ratios of {lost[0]}{more} are NaN after iteration '
            f'{iteration} (looked at every {self.interval} iterations); the loss was '
            f'{self._loss(runner)}'
        )

    def _loss(self, runner) -> float | None:
        """Mean of the loss over the interval; mmengine has it as numbers already."""
        scalars = runner.message_hub.log_scalars
        if 'train/loss' not in scalars:
            return None
        return float(scalars['train/loss'].mean(self.interval))


def _is_logged(runner, batch_idx: int) -> bool:
    """Whether mmengine writes a line of the log after this iteration."""
    return any(
        isinstance(hook, LoggerHook)
        and (
            hook.every_n_inner_iters(batch_idx, hook.interval)
            or hook.end_of_epoch(runner.train_dataloader, batch_idx)
        )
        for hook in runner.hooks
    )


def _is_finite(row: LayerRatios) -> bool:
    return all(map(math.isfinite, row.mean_ratios + row.var_ratios))


def importance_scalars(
    model: nn.Module, rows: list[LayerRatios]
) -> tuple[dict[str, float], dict[str, float]]:
    """Radius, decided layers and ratios of a model, whose rows these are, as named numbers.

    Returns:
        The summary over all layers, and the ratios layer by layer.
    """
    if not rows:
        return {}, {}
    per_layer: dict[str, float] = {}
    by_normalizer: dict[str, list[float]] = {}
    for row in rows:
        for statistic in STATISTICS:
            for normalizer, ratio in row.ratios(statistic).items():
                per_layer[f'ssn/{row.layer}/{statistic}/{normalizer}'] = ratio
                by_normalizer.setdefault(normalizer, []).append(ratio)
    radii = {row.layer: row.radius for row in rows if row.radius is not None}
    # A frozen stage keeps the radius of its pretraining, which no schedule of this run sets.
    scheduled = [r for n, r in radii.items() if model.get_submodule(n).mean_weight.requires_grad]
    summary = {
        'ssn_radius': max(scheduled or radii.values(), default=0.0),
        'ssn_decided': float(sum(row.decided for row in rows)),
    }
    # Layers without the candidate count as 0, or the shares would not sum to 1.
    count = len(STATISTICS) * len(rows)
    summary |= {f'ssn_{n}': sum(ratios) / count for n, ratios in by_normalizer.items()}
    return summary, per_layer
