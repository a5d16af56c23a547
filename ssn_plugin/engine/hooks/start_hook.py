"""SSNStartHook: what a run starts with, and what in it will not work, before its first step."""

from mmengine.hooks import Hook
from torch import nn

from ssn_plugin.engine import start_check
from ssn_plugin.engine.model_wrapper import optim_wrappers, unwrapped


class SSNStartHook(Hook):
    """Log which norm layers a run has and what keeps them from being decided, each with its remedy.

    Before a training the log gets one block: norm layers by type and part of the model, their
    candidates, how many are decided, images per process; then warnings. A training that makes no
    sense is an error: SSN asked for and none in the model, or labels for which a head has no class.
    Before a test or a validation alone the block has no warnings.

    ``tools/train.py`` and ``tools/test.py`` add this hook where a config imports this package.

    Raises:
        InputError: While training, in one line that names the entry of the config.

    Example:
        >>> custom_hooks = [dict(type='SSNStartHook')]  # in a config
    """

    # After all that changes the model before the first step.
    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._told = False

    def before_train(self, runner) -> None:
        """Check and tell."""
        model = unwrapped(runner.model)
        config = runner.cfg.to_dict()
        start_check.check_norms_asked_for(model, config)
        loader = runner.train_loop.dataloader
        metainfo = getattr(loader.dataset, 'metainfo', None) or {}
        start_check.check_classes(model, metainfo.get('classes'))
        images = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None)
        self._first = runner.iter
        warnings = start_check.training_warnings(
            model,
            images,
            [type(hook).__name__ for hook in runner.hooks],
            config,
            [wrapper.optimizer for wrapper in optim_wrappers(runner.optim_wrapper)],
        )
        facts = [f'images per process: {images}'] if images else []
        self._tell(runner, model, facts, list(warnings))

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Look at the labels of the first batch."""
        if runner.iter == self._first:
            start_check.check_labels(unwrapped(runner.model), data_batch)

    def before_val(self, runner) -> None:
        """Tell, unless a training has done so."""
        self._tell(runner, unwrapped(runner.model))

    def before_test(self, runner) -> None:
        """Tell, unless a training has done so."""
        self._tell(runner, unwrapped(runner.model))

    def _tell(self, runner, model: nn.Module, facts=(), warnings=()) -> None:
        if self._told:
            return
        self._told = True
        lines = [*start_check.norms_in_words(model), *facts]
        lines += [f'WARNING {warning}' for warning in warnings]
        text = ''.join(f'\n  {line}' for line in lines)
        (runner.logger.warning if warnings else runner.logger.info)(f'SSNStartHook:{text}')
