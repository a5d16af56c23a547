"""Keeps ``ssn_lr_mult`` where a scheduler sets learning rates instead of scaling them.

Most schedulers of mmengine scale what each parameter group began with. A smallest learning rate
(``eta_min``) and the maximum of OneCycleLR are one number for all groups, so that in the end
control parameters would learn as fast as all others. Whatever else sets learning rates is noticed.
"""

import functools
import math
from collections.abc import Iterator

from mmengine.optim import OptimWrapperDict
from mmengine.optim.scheduler.param_scheduler import (
    OneCycleParamScheduler,
    ReduceOnPlateauParamScheduler,
    _ParamScheduler,
)


def keep_ratios(optim_wrapper, schedulers) -> None:
    """Make the schedulers of a run keep the ratio between its groups' learning rates.

    Wrappers that SSNOptimWrapperConstructor built know the ratios. Schedulers are a list, a dict of
    lists where there are several wrappers, or None.
    """
    if isinstance(optim_wrapper, OptimWrapperDict):
        for name, wrapper in optim_wrapper.items():
            keep_ratios(wrapper, (schedulers or {}).get(name))
        return
    mults = getattr(optim_wrapper, 'ssn_lr_mults', [])
    for scheduler in schedulers or ():
        if scheduler.param_name == 'lr' and any(mult != 1 for mult in mults):
            _keep_ratio(scheduler, mults)


def _keep_ratio(scheduler: _ParamScheduler, mults: list[float]) -> None:
    groups = scheduler.optimizer.param_groups
    mults = mults + [1.0] * (len(groups) - len(mults))  # mmengine adds a group for the log
    if isinstance(scheduler, OneCycleParamScheduler):
        if len({group['max_lr'] for group in groups}) == 1:  # otherwise the user gave a list
            scheduler.__class__ = _scaled(type(scheduler))
            if scheduler.last_step == 0:  # its constructor has set the initial rates already
                for group, mult in zip(groups, mults, strict=True):
                    group['lr'] *= mult
    elif isinstance(scheduler, ReduceOnPlateauParamScheduler):
        if len(set(scheduler.min_values)) == 1:  # in a resumed run they are scaled already
            scheduler.min_values = [
                value * mult for value, mult in zip(scheduler.min_values, mults, strict=True)
            ]
    elif getattr(scheduler, 'eta_min', None) and getattr(scheduler, 'eta_min_ratio', None) is None:
        scheduler.__class__ = _with_own_floors(type(scheduler))
    scheduler.ssn_lr_mults = mults


def pairs_to_watch(optim_wrapper) -> list[tuple]:
    """For every learning rate a group of control parameters, and one of others, to compare it with.

    Returns:
        Tuples of the optimizer, the indices of both groups, and the factor between their rates.
    """
    if isinstance(optim_wrapper, OptimWrapperDict):
        return [pair for wrapper in optim_wrapper.values() for pair in pairs_to_watch(wrapper)]
    mults = getattr(optim_wrapper, 'ssn_lr_mults', [])
    rates = getattr(optim_wrapper, 'ssn_rates', [])
    built = list(enumerate(zip(rates, mults, strict=True)))
    others = {rate: index for index, (rate, mult) in built if mult == 1}
    control = {
        rate: (optim_wrapper.optimizer, index, others[rate], mult)
        for index, (rate, mult) in built
        if mult != 1 and rate in others
    }
    return list(control.values())


def lost_ratios(pairs: list[tuple]) -> Iterator[str]:
    """What to say of those :func:`pairs_to_watch` whose rates differ by another factor now."""
    for optimizer, control, other, mult in pairs:
        rate, usual = (float(optimizer.param_groups[index]['lr']) for index in (control, other))
        if not math.isclose(rate, mult * usual, rel_tol=1e-3, abs_tol=1e-12):
            yield (
                f'control parameters learn at a rate of {rate:.3g} beside one of {usual:.3g}, '
                f'where ssn_lr_mult={mult:g} asks for {mult * usual:.3g}: something sets learning '
                "rates instead of scaling them; take a scheduler of mmengine's, or give yours one "
                'value for each parameter group'
            )


@functools.cache
def _scaled(kind: type[_ParamScheduler]) -> type[_ParamScheduler]:
    class Scaled(kind):
        def _get_value(self) -> list[float]:
            pairs = zip(super()._get_value(), self.ssn_lr_mults, strict=True)
            return [value * mult for value, mult in pairs]

    Scaled.__name__ = kind.__name__
    return Scaled


@functools.cache
def _with_own_floors(kind: type[_ParamScheduler]) -> type[_ParamScheduler]:
    class WithOwnFloors(kind):
        def _get_value(self) -> list[float]:
            floor = self.eta_min
            by_mult = {}
            for mult in set(self.ssn_lr_mults):
                self.eta_min = floor * mult
                by_mult[mult] = super()._get_value()
            self.eta_min = floor
            return [by_mult[mult][index] for index, mult in enumerate(self.ssn_lr_mults)]

    WithOwnFloors.__name__ = kind.__name__
    return WithOwnFloors
