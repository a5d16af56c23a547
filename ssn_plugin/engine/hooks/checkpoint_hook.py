"""SSNCheckpointHook: a run that dies while it writes a checkpoint still has the one before."""

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log

from ssn_plugin.checkpoint.whole_file import INCOMPLETE, whole_file
from ssn_plugin.engine.progress import ended_early
from ssn_plugin.engine.whole_file_backend import WholeFileBackend
from ssn_plugin.errors import CheckpointError


class SSNCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, which never breaks or removes the only checkpoint.

    mmengine writes checkpoints and ``last_checkpoint`` in place and removes the oldest before the
    new one is written. Here a checkpoint is written under another name, brought to the disk and
    then renamed; then ``last_checkpoint`` is replaced the same way; only then what is too old is
    removed, and a previous best one likewise. After a kill or a full disk at any moment,
    ``last_checkpoint`` names a whole file, or there is none yet.

    Arguments are those of ``CheckpointHook``. The promise is for a local folder: with an
    ``out_dir`` elsewhere or ``backend_args`` of one's own, writing is up to that backend.

    Raises:
        CheckpointError: While training, if a checkpoint cannot be written; its text names the file,
            the reason and the checkpoint to resume from.

    Example:
        >>> default_hooks = dict(checkpoint=dict(type='SSNCheckpointHook'))  # in a config
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        local = self.out_dir is None or '://' not in str(self.out_dir)
        if local and self.backend_args is None and self.file_client_args is None:
            self.backend_args = dict(backend='whole_file')
        self._trains = False

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            last = self.last_ckpt
            rest = f'resume from {last}' if last else 'there is no earlier checkpoint'
            reason = (
                f'{error.filename or self.out_dir}: cannot be written: {error.strerror or error}'
            )
            raise CheckpointError(f'{reason}; {rest}') from error

    def before_train(self, runner) -> None:
        """As in the base class; clear away what a killed run left half-written in the folder."""
        super().before_train(runner)
        self._trains = True
        if is_main_process() and isinstance(self.file_backend, WholeFileBackend):
            for folder, name in ((self.out_dir, '*.pth'), (runner.work_dir, 'last_checkpoint')):
                for path in Path(folder).glob(f'{name}.*{INCOMPLETE}'):
                    with contextlib.suppress(OSError):
                        path.unlink()
        if self.last_ckpt is None and runner.iter > 0:
            self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        limited = self.max_keep_ckpts > 0
        kept = list(self.keep_ckpt_ids) if limited else []
        if limited and kept[-1:] != [step]:
            kept.append(step)
            # The list still has the checkpoint that is removed below. If the run dies before it
            # is removed, the resumed run finds it in the list and removes it.
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        filename = self.filename_tmpl.format(step)
        with self._explaining():
            path = self.file_backend.join_path(self.out_dir, filename)
            runner.message_hub.update_info('last_ckpt', path)
            runner.save_checkpoint(
                self.out_dir,
                filename,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                with whole_file(Path(runner.work_dir, 'last_checkpoint')) as temporary:
                    temporary.write_text(path, encoding='utf-8')
            self.last_ckpt = path
        if limited:
            self.keep_ckpt_ids = deque(kept[-self.max_keep_ckpts :], self.max_keep_ckpts)
            for outdated in kept[: -self.max_keep_ckpts]:
                name = self.filename_tmpl.format(outdated)
                self._remove(self.file_backend.join_path(self.out_dir, name))

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        if not self._trains:  # a run that only validates has nothing to save
            return
        if not isinstance(self.file_backend, WholeFileBackend):
            super()._save_best_checkpoint(runner, metrics)
            return
        with self._explaining(), self.file_backend.collecting_removals() as outdated:
            super()._save_best_checkpoint(runner, metrics)
        best = {getattr(self, 'best_ckpt_path', None)}
        best |= set(getattr(self, 'best_ckpt_path_dict', {}).values())
        for path in outdated:
            if path not in best:
                self._remove(path)

    def after_train(self, runner) -> None:
        """As in the base class, which may publish what was saved.

        A run that was ended before its last iteration, by EarlyStoppingHook for one, gets its last
        checkpoint here.
        """
        if self.save_last and ended_early(runner):
            step = runner.epoch if self.by_epoch else runner.iter
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, step, meta)
        with self._explaining():
            super().after_train(runner)

    def _remove(self, path: str) -> None:
        if not is_main_process():
            return
        try:
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):
                self.file_backend.rmtree(path)  # deepspeed's checkpoints are folders
        except OSError as error:
            print_log(
                f'SSNCheckpointHook: {path}: cannot be removed: {error.strerror or error}',
                logger='current',
                level=logging.WARNING,
            )
