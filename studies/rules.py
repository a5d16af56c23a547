"""What a norm means to a run: its training rules, and what it chose."""

from collections.abc import Sequence

from mmengine.config import Config

from ssn_plugin.analysis.layer_ratios import STATISTICS, LayerRatios

CANDIDATES = ('IN', 'LN', 'BN')


def set_rules(config: Config, norm: str, interval: int) -> None:
    """Leave a config with the hooks and the rules for control parameters that a norm needs.

    Args:
        config: Based on configs/_base_/ssn_training.py; changed in place.
        norm: 'BN', 'GN', 'SN', 'SSN', or 'SSN-radius0', whose radius is held at 0.
        interval: Iterations between two records of the losses and of the ratios.
    """
    config.default_hooks.logger.interval = interval
    hooks = {hook.type: hook for hook in config.custom_hooks}
    hooks['SSNRatioHook'].update(interval=interval, report=False)
    hooks['SSNRadiusHook'].update(end=1.0, min_values=0)  # the paper's
    if norm == 'SSN-radius0':
        hooks['SSNRadiusHook'].end_radius = 0.0
    elif norm == 'SN':  # those of configs/_base_/sn_training.py
        config.optim_wrapper.paramwise_cfg.update(
            ssn_lr_mult=1.0, ssn_decay_mult=0.0, ssn_clip_norm=None
        )
        del hooks['SSNRadiusHook']
    elif norm in ('BN', 'GN'):
        del hooks['SSNRadiusHook'], hooks['SSNRatioHook']
        del config.optim_wrapper.constructor, config.optim_wrapper.paramwise_cfg
    config.custom_hooks = list(hooks.values())


def shares(ratios: Sequence[LayerRatios], candidates: Sequence[str] = CANDIDATES) -> dict[str, str]:
    """Importance ratios averaged over layers: the share of the layers where all are one-hot.

    Args:
        ratios: Layer by layer; none for BN and GN.
        candidates: All normalizers that any layer can choose.

    Raises:
        KeyError: If a layer can choose another one.
    """
    found = {}
    for statistic in STATISTICS:
        sums = dict.fromkeys(candidates, 0.0)
        for row in ratios:
            for name, value in row.ratios(statistic).items():
                sums[name] += value
        for name, total in sums.items():
            found[f'{statistic}_{name}'] = f'{total / len(ratios):.4f}' if ratios else ''
    return found
