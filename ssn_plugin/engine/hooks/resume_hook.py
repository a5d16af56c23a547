"""SSNResumeHook: a run that was interrupted ends with the weights of one that was not."""

from mmengine.hooks import Hook

from ssn_plugin.engine.randomness import seed_iteration, seed_samples


class SSNResumeHook(Hook):
    """Make random numbers a function of the iteration, and augmentation one of the sample's place.

    mmengine restores weights, optimizer and schedules, and finds the place in the data; the random
    numbers of dropout, sampling of proposals and augmentation go on from where a new process
    starts. With this hook they depend on nothing but the seed, the iteration (for a sample: the
    place in the order of samples) and the rank. So a run that is killed and resumed, any number of
    times, computes what an uninterrupted one computes: on a CPU bit by bit, on GPUs as far as their
    kernels are deterministic. The number of data loading workers makes no difference either.

    Without ``randomness=dict(seed=...)`` the seed that was drawn is in the checkpoint; it is
    restored, and the order of the data with it. Every sampler that draws indices will do.

    Not covered is what keeps a state of its own: transforms that cache earlier images
    (CachedMosaic), generators that are not the global ones of Python, numpy and torch, an
    epoch-based loop whose checkpoints are counted in iterations, and what was accumulated of a
    gradient (``accumulative_counts``) when a kill or a checkpoint came before its step; with
    mmengine 0.10.7, whose workers begin before any hook can, mmdet's GroupMultiSourceSampler too.

    Example:
        >>> custom_hooks = [dict(type='SSNResumeHook')]  # in a config
    """

    # Before every other hook that draws.
    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        """Note the seed from before a checkpoint brings its own."""
        self._seed_at_start = runner.seed

    def before_train(self, runner) -> None:
        """Prepare the data loader."""
        loop = runner.train_loop
        sampler = getattr(getattr(loop.dataloader, 'batch_sampler', None), 'sampler', None)
        if getattr(sampler, 'seed', None) == self._seed_at_start:
            sampler.seed = runner.seed
        self._sampler = sampler if seed_samples(loop.dataloader, runner.seed) else None
        if self._sampler is None:
            runner.logger.warning(
                f'SSNResumeHook: train_dataloader: got a {type(loop.dataloader.dataset).__name__} '
                'that is not drawn by the indices of a sampler; a resumed run will augment its '
                'images with other random numbers'
            )
        if hasattr(loop, 'dataloader_iterator'):
            # Some versions of mmengine start their workers as soon as they build the loop.
            loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)

    def before_train_epoch(self, runner) -> None:
        """Tell the sampler which epoch begins; in an iteration-based loop the only one."""
        if self._sampler is not None:
            self._sampler.begin(runner.epoch)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seed."""
        seed_iteration(runner.seed, runner.iter)
