"""SSNOptimWrapperConstructor: learning rate, weight decay and clipping of control parameters."""

import logging
import math

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn
from torch.optim import Optimizer

from ssn_plugin.engine.model_wrapper import unwrapped
from ssn_plugin.functional import check_not_negative
from ssn_plugin.layers.selected_norm import SelectedNorm
from ssn_plugin.layers.switchable import SwitchableNorm
from ssn_plugin.torch_versions import before_every_step
from ssn_plugin.training import clip_or_drop, without_finite_gradient

_DEFAULTS = dict(ssn_lr_mult=0.1, ssn_decay_mult=0.0, ssn_clip_norm=1.0)


class SSNOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, with the training rules of SSN and SN layers.

    Control parameters (``mean_weight``, ``var_weight``) get their own learning rate and weight
    decay, and the norm of their joint gradient is clipped before every optimizer step: after
    accumulation, after a GradScaler has unscaled, and before the wrapper's own ``clip_grad``, so
    that the steep gradient of a layer near a tie does not shrink all others. The layers'
    ``weight`` and ``bias`` are treated as those of any norm layer (``norm_decay_mult``).
    Everything else is as in ``DefaultOptimWrapperConstructor``. SSN layers are found by type.

    Args:
        optim_wrapper_cfg: As in ``DefaultOptimWrapperConstructor``.
        paramwise_cfg: As there, and

            - ``ssn_lr_mult``: Factor on the learning rate of control parameters, on top of that
              of a matching ``custom_keys`` entry. Defaults to 0.1.
            - ``ssn_decay_mult``: Factor on their weight decay, instead of any other. Defaults to 0.
            - ``ssn_clip_norm``: Largest norm of their joint gradient, or None. Defaults to 1.

    Raises:
        ValueError: If one of these is negative or no number, or another ``ssn_`` key is given.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN
        >>> from ssn_plugin.engine.optim_wrapper_constructor import SSNOptimWrapperConstructor
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN(8))
        >>> cfg = dict(optimizer=dict(type='SGD', lr=0.02, weight_decay=1e-4))
        >>> wrapper = SSNOptimWrapperConstructor(cfg)(model)
        >>> [group['lr'] for group in wrapper.optimizer.param_groups][-2:]
        [0.002, 0.002]

    Source:
        The rules are those of the authors' training of SSN on ImageNet.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        given = {} if paramwise_cfg is None else paramwise_cfg
        unknown = sorted(k for k in given if k.startswith('ssn_') and k not in _DEFAULTS)
        if unknown:
            raise ValueError(
                f'paramwise_cfg: got {", ".join(unknown)}, expected out of {", ".join(_DEFAULTS)}'
            )
        paramwise_cfg = {**_DEFAULTS, **given}
        for name in _DEFAULTS:
            value = paramwise_cfg[name]
            if value is not None or name != 'ssn_clip_norm':
                check_not_negative(value, name)
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None
    ) -> None:
        """Add the parameters of a module and its children, recursively."""
        if not isinstance(module, SwitchableNorm | SelectedNorm):
            super().add_params(params, module, prefix, is_dcn_module)
            return
        # The base class recognises norm layers by a list of types that does not include ours. So it
        # is given a GroupNorm that holds the same parameters, and treats these as those of any norm
        # layer, custom_keys included.
        stand_in = nn.GroupNorm(1, 1, affine=False)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(stand_in, name, parameter)
        super().add_params(params, stand_in, prefix, is_dcn_module)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer of a model, which may be wrapped, and the wrapper of that."""
        wrapper = super().__call__(model)
        optimizer = wrapper.optimizer
        control = _trained_control_parameters(model)
        known = {id(parameter) for parameter in control.values()}
        wrapper.ssn_lr_mults = []
        wrapper.ssn_rates = [group['lr'] for group in optimizer.param_groups]  # without the factor
        # Read from the groups that were built, because these hold the optimizer's defaults too.
        for group in optimizer.param_groups:
            mult = self.paramwise_cfg['ssn_lr_mult'] if id(group['params'][0]) in known else 1.0
            wrapper.ssn_lr_mults.append(mult)
            if id(group['params'][0]) in known:
                group['lr'] *= mult
                if 'weight_decay' in group:
                    decay = optimizer.defaults['weight_decay']
                    group['weight_decay'] = decay * self.paramwise_cfg['ssn_decay_mult']
        if control:
            max_norm = self.paramwise_cfg['ssn_clip_norm']
            _Clipping(wrapper, control, math.inf if max_norm is None else max_norm)
        return wrapper


def _trained_control_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f'{name}.{kind}': parameter
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, SwitchableNorm)
        for kind in ('mean_weight', 'var_weight')
        if (parameter := getattr(module, kind)).requires_grad
    }


class _Clipping:
    """Clips the gradients of control parameters before every step of a wrapper."""

    def __init__(
        self, wrapper: OptimWrapper, control: dict[str, nn.Parameter], max_norm: float
    ) -> None:
        self.wrapper = wrapper
        self.control = control
        self.max_norm = max_norm
        self.said = False
        # Wrappers differ in how they accumulate and unscale, but all have done so when they call
        # the optimizer's step.
        before_every_step(wrapper.optimizer, self.before_step)
        if wrapper.clip_grad_kwargs:
            self.clip_all = wrapper._clip_grad  # called by the wrapper on unscaled gradients
            wrapper._clip_grad = self.clip_control_then_all

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        # A fused optimizer divides gradients by the loss scale inside its step, so here they are
        # still scaled. It skips a step whose gradients are infinite, so nothing is clipped then.
        scale, infinite = (getattr(optimizer, name, None) for name in ('grad_scale', 'found_inf'))
        if infinite is None or not bool(infinite):
            self.clip(1.0 if scale is None else float(scale))

    def clip_control_then_all(self) -> None:
        self.clip()
        self.clip_all()

    def clip(self, scale: float = 1.0) -> None:
        parameters = list(self.control.values())
        lost = without_finite_gradient(parameters)
        # With a loss scaler infinite gradients are normal, and the scaler skips such a step, so
        # there is nothing to warn of.
        if not self.said and not hasattr(self.wrapper, 'loss_scaler'):
            self.say(lost)
        clip_or_drop(parameters, self.max_norm * scale, lost)

    def say(self, lost: list[int]) -> None:
        if not lost:
            return
        self.said = True
        names = list(self.control)
        iteration = self.wrapper.message_hub.runtime_info.get('iter', -1) + 1
        print_log(
            f'SSNOptimWrapperConstructor: the gradient of {names[lost[0]]} is NaN or infinite in '
            f'iteration {iteration}, of {len(lost)} of {len(names)} control parameters in all'
            f'{", as it is if the loss was" if len(lost) == len(names) else ""}; whenever that is '
            'so, no control parameter is moved',
            logger='current',
            level=logging.WARNING,
        )
