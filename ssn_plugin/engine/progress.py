"""How far a run is, the same for a resumed one whose batch size or number of processes changed.

mmengine restores the number of iterations as it was. In an epoch-based loop that number means
something else when an epoch has more or fewer iterations than before; epochs mean the same.
"""

from mmengine.runner import EpochBasedTrainLoop


def iterations(runner, batch_idx: int) -> tuple[int, int]:
    """Which iteration of how many this is, for a run that had today's batches from its beginning.

    ``batch_idx`` is the number of the batch that hooks are given within an iteration.
    """
    if isinstance(getattr(runner, 'train_loop', None), EpochBasedTrainLoop):
        # len() of the loader would do, but some batch samplers draw all indices to find it.
        length = runner.max_iters // max(runner.max_epochs, 1)
        return runner.epoch * length + batch_idx, runner.max_iters
    return runner.iter, runner.max_iters


def is_last_iteration(runner, batch_idx: int) -> bool:
    """Whether the run ends with this iteration."""
    iteration, total = iterations(runner, batch_idx)
    return iteration + 1 == total


def ended_early(runner) -> bool:
    """Whether a run is over without its last iteration, as EarlyStoppingHook ends it."""
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        return runner.epoch < runner.max_epochs
    return runner.iter < runner.max_iters


def iterations_in_all(runner) -> int:
    """How far ``runner.iter`` will have counted at the end of the run, told before it begins."""
    done, total = iterations(runner, 0)
    return runner.iter + total - done


def changed_since(runner) -> str | None:
    """Tell, before a run begins, if it counts iterations otherwise than the one that it resumes."""
    done, _ = iterations(runner, 0)
    if done == runner.iter:
        return None
    return (
        f'resumed after {runner.epoch} epochs and {runner.iter} iterations, where {runner.epoch} '
        f'epochs are {done} iterations now (another batch size, number of processes or data set, '
        'or a checkpoint from within an epoch); the radius and what is done at the end follow the '
        'epochs'
    )
