"""SSNRadiusHook: the radius schedule of a run."""

from mmengine.hooks import Hook

from ssn_plugin.checkpoint.candidates import record_candidates
from ssn_plugin.checkpoint.traits import told_candidates, traits_of
from ssn_plugin.engine.averaged_copies import AveragedCopies
from ssn_plugin.engine.checkpoint_schemes import fit_loaded
from ssn_plugin.engine.learning_rates import keep_ratios, lost_ratios, pairs_to_watch
from ssn_plugin.engine.model_wrapper import unwrapped
from ssn_plugin.engine.progress import changed_since, iterations
from ssn_plugin.layers.few_values import FewValues
from ssn_plugin.layers.radius import copy_selection, set_radius, undecided_layers
from ssn_plugin.layers.ssn import SSN
from ssn_plugin.training import radius_at


class SSNRadiusHook(Hook):
    """Grow the radius of every SSN linearly with the iteration, which decides layer after layer.

    ``radius = start_radius + (end_radius - start_radius) * (t - begin) / (end - begin)`` with the
    progress t = iteration / (iterations - 1), clamped to [begin, end], set before every forward
    pass. It is a function of the progress alone: iteration- and epoch-based loops see the same,
    and a resumed run goes on at the exact value. In an epoch-based loop the progress is taken from
    the epoch and the place in it, so that it may be resumed with another batch size or number of
    processes. With the defaults, those of the paper's authors, every layer is one-hot after
    81.65 % of the run.

    Copies of the model that average it (of EMAHook, of torch's ``AveragedModel`` in a hook, the
    teacher of mmdet's MeanTeacherHook) follow its radius and its choices.

    Args:
        begin: Fraction of the run at which the radius starts to grow.
        end: Fraction of the run at which it has grown.
        start_radius: Radius until ``begin``.
        end_radius: Radius from ``end`` on; three candidates are one-hot from 0.8165 on.
        min_values: In a layer that has yet to choose, 'IN' and 'BN' are no candidates if they have
            fewer values per channel than this in the first iteration, or when the layer is first
            trained: after a global pooling, for one. 0 leaves all candidates in, as the paper does.

    Raises:
        ValueError: If fractions are not 0 <= begin < end <= 1, a radius is negative or NaN, or
            ``min_values`` is no whole number from 0 on.

    Example:
        >>> from ssn_plugin.engine.hooks.radius_hook import SSNRadiusHook
        >>> custom_hooks = [dict(type='SSNRadiusHook', end=0.9)]  # in a config
        >>> SSNRadiusHook(end=0.5).radius_at(iteration=25, max_iters=101)
        0.5

    Source:
        Shao et al., "SSN: Learning Sparse Switchable Normalization via SparsestMax", IJCV 2020.
    """

    # Before hooks of normal priority, so that those see the radius of their own iteration.
    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        begin: float = 0.0,
        end: float = 1.0,
        start_radius: float = 0.0,
        end_radius: float = 1.0,
        min_values: int = 0,
    ) -> None:
        if isinstance(min_values, bool) or not isinstance(min_values, int) or min_values < 0:
            raise ValueError(f'min_values: got {min_values!r}, expected a whole number from 0 on')
        self.begin = begin
        self.end = end
        self.start_radius = start_radius
        self.end_radius = end_radius
        self.radius_at(0, 2)  # raises if the arguments are no schedule
        self._copies = AveragedCopies()
        self.min_values = min_values
        self._few_values: FewValues | None = None
        self._passed = 0
        self._rates: list[tuple] = []

    def radius_at(self, iteration: int, max_iters: int) -> float:
        """Radius during an iteration.

        Args:
            iteration: Counted from 0 over the whole run.
            max_iters: Iterations of the whole run.
        """
        progress = iteration / (max_iters - 1) if max_iters > 1 else 1.0
        return radius_at(progress, self.begin, self.end, self.start_radius, self.end_radius)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Fit a warm start (``bn2ssn://``) to the model, and name the candidates of old files."""
        fit_loaded(unwrapped(runner.model), checkpoint)
        if runner._resume:  # the checkpoint tells which parts of the model are averaged copies
            known = checkpoint.get('meta', {}).get('averaged_copies', ())
            self._copies = AveragedCopies(tuple(known))
        if 'state_dict' in checkpoint:
            told = told_candidates(checkpoint)
            checkpoint['state_dict'] = record_candidates(checkpoint['state_dict'], told)

    def before_train(self, runner) -> None:
        """Say so if there is nothing to schedule, or nothing that could be learned."""
        keep_ratios(runner.optim_wrapper, runner.param_schedulers)
        self._rates = pairs_to_watch(runner.optim_wrapper)
        if changed := changed_since(runner):
            runner.logger.warning(f'SSNRadiusHook: {changed}')
        layers = [module for module in runner.model.modules() if isinstance(module, SSN)]
        if not layers:
            runner.logger.warning(
                'SSNRadiusHook: the model has no SSN layer, so there is no radius to set. '
                "Is norm_cfg=dict(type='SSN') missing?"
            )
        # With two candidates the constraint leaves the ratios two points: the first gradient would
        # decide the layer.
        pairs = [layer for layer in layers if len(layer.normalizers) == 2]
        if pairs and self.begin == 0 and self.end_radius > 0:
            runner.logger.warning(
                f'SSNRadiusHook: {len(pairs)} SSN layers have two candidates, '
                f'{pairs[0].normalizers}, and choose within the first iterations when the radius '
                'grows from the start; set begin, for example dict(type="SSNRadiusHook", begin=0.3)'
            )

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Set the radius, in all averaged copies of the model too.

        Warn once if control parameters have lost their share of the learning rate.
        """
        for text in lost_ratios(self._rates):
            runner.logger.warning(f'SSNRadiusHook: in iteration {runner.iter + 1} {text}')
            self._rates = []
        if self.min_values and self._few_values is None:
            self._few_values = FewValues(unwrapped(runner.model), self.min_values)
        set_radius(runner.model, self.radius_at(*iterations(runner, batch_idx)))
        for averaged in self._copies.of(runner):
            for layer, its_copy in averaged.layers:
                choices = layer.known_choices()
                if choices is not None and choices == its_copy.known_choices():
                    its_copy.radius.copy_(layer.radius)
                else:
                    copy_selection(layer, its_copy)
            # After two iterations it must have been updated.
            if self._passed == 2 and averaged.has_new_statistics():
                runner.logger.warning(
                    f'SSNRadiusHook: {averaged.name}: nobody averages its running statistics, '
                    'which BN uses in evaluation; let whoever averages it take buffers along, as '
                    'dict(type="MeanTeacherHook", skip_buffer=False) does'
                )
        self._passed += 1

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Leave out candidates that have too few values, after the first iteration.

        After 2, 4, 8, ... iterations those of layers that were not reached or were frozen before.
        """
        if self._few_values is None or self._passed & (self._passed - 1):
            return
        for name, candidates in self._few_values.leave_out().items():
            runner.logger.info(
                f'SSNRadiusHook: {name}: {" and ".join(candidates)} left out, with fewer than '
                f'min_values={self.min_values} values per channel'
            )
        unreached = self._few_values.unreached()
        if unreached and self._passed == 1:
            runner.logger.info(
                f'SSNRadiusHook: min_values={self.min_values} waits for {len(unreached)} SSN '
                'layers that no training pass has reached outside torch.compile: '
                f'{", ".join(unreached)}'
            )

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Tell in the checkpoint's ``meta`` what its weights do not show of the backbone.

        These are ``normalizers``, in their order, ``stem_padding``, and the names of
        ``averaged_copies``.
        """
        model = unwrapped(runner.model)
        traits = traits_of(getattr(model, 'backbone', model))
        names = [averaged.name for averaged in self._copies.of(runner)]
        checkpoint.setdefault('meta', {}).update(traits, averaged_copies=names)

    def after_train(self, runner) -> None:
        """Warn about layers that did not become one-hot."""
        model = unwrapped(runner.model)
        layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, SSN)}
        lost = [name for name, layer in layers.items() if _is_lost(layer)]
        undecided = [name for name in undecided_layers(model) if name not in lost]
        frozen = [name for name in undecided if not layers[name].mean_weight.requires_grad]
        growing = [name for name in undecided if name not in frozen]
        if lost:
            runner.logger.warning(
                f'SSNRadiusHook: {len(lost)} SSN layers have control parameters that are NaN or '
                f'infinite, so they choose nothing; the training diverged: {", ".join(lost)}'
            )
        if growing:
            runner.logger.warning(
                f'SSNRadiusHook: {len(growing)} SSN layers are not one-hot at the end of training '
                f'(end_radius={self.end_radius}): {", ".join(growing)}'
            )
        if frozen:
            runner.logger.warning(
                f'SSNRadiusHook: {len(frozen)} SSN layers with frozen parameters keep ratios that '
                f'are not one-hot: {", ".join(frozen)}'
            )


def _is_lost(layer: SSN) -> bool:
    """Whether something that is to be decided has no number any more."""
    pairs = ((layer.mean_fixed, layer.mean_weight), (layer.var_fixed, layer.var_weight))
    return any(int(fixed) == 0 and not bool(c.isfinite().all()) for fixed, c in pairs)
