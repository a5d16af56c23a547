"""A training in pieces: it stops behind a checkpoint once the budget is spent, to go on later."""

import time

from mmengine.hooks import Hook

from studies.ledger import Budget


class BudgetSpentError(Exception):
    """The training stopped behind a checkpoint from which the next call goes on."""


class PieceHook(Hook):
    """Ends a training whose budget is spent, and counts what all its pieces took.

    Args:
        budget: Looked at behind every checkpoint.

    Attributes:
        seconds: Wall-clock time of training, over all pieces.
        pieces: Their number.
    """

    priority = 'LOWEST'  # behind CheckpointHook

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.seconds = 0.0
        self.pieces = 0
        self._saved = False

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Read what the earlier pieces took.

        Args:
            runner: mmengine's Runner.
            checkpoint: That of an earlier piece.
        """
        self.seconds, self.pieces = checkpoint['meta']['study_pieces']

    def before_train(self, runner) -> None:
        """Start the clock.

        Args:
            runner: mmengine's Runner.
        """
        self.pieces += 1
        self._since = time.perf_counter()

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Read the clock.

        Args:
            runner: mmengine's Runner.
            checkpoint: Gets what the pieces took.
        """
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        self._saved = True
        checkpoint['meta']['study_pieces'] = (self.seconds, self.pieces)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Stop behind a checkpoint of an iteration if the budget is spent.

        Args:
            runner: mmengine's Runner.
            batch_idx: Unused.
            data_batch: Unused.
            outputs: Unused.

        Raises:
            BudgetSpentError: If it is, and iterations are left.
        """
        self._stop(runner.iter + 1 < runner.max_iters)

    def after_train_epoch(self, runner) -> None:
        """Stop behind a checkpoint of an epoch if the budget is spent.

        Args:
            runner: mmengine's Runner.

        Raises:
            BudgetSpentError: If it is, and epochs are left.
        """
        self._stop(runner.iter < runner.max_iters)

    def _stop(self, unfinished: bool) -> None:
        if self._saved and unfinished and self.budget.spent:
            raise BudgetSpentError
        self._saved = False
