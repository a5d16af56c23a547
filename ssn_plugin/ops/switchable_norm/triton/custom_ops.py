"""The Triton backend as two custom operators of torch, for torch.compile.

`torch.ops.ssn_plugin.switchable_norm_forward` and `..._backward` are what
:func:`launch.forward` and :func:`launch.backward` are, with the arguments that a schema can
express: tracing sees one node, no kernel and no Python code. Operators return tensors
only, so what is None there is an empty tensor here.
"""

import torch
from torch import Tensor, library

from ssn_plugin.ops.switchable_norm.triton import launch as backend

_SETTINGS = (
    'str[] normalizers, int num_groups, int correction, float eps, '
    'int? mean_selected=None, int? var_selected=None'
)
_FORWARD = (
    '(Tensor x, Tensor? mean_control, Tensor? var_control, str ratio_map, Tensor? radius, '
    'Tensor? mean_fixed, Tensor? var_fixed, Tensor? mean_choice, Tensor? var_choice, '
    'Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, '
    f'float momentum, Tensor? momentum_tensor, bool training, {_SETTINGS}) -> (Tensor, Tensor)'
)
_BACKWARD = (
    '(Tensor dy, Tensor x, Tensor saved, Tensor? weight, str ratio_map, bool constant, '
    f'{_SETTINGS}, bool needs_dx=True, bool needs_control=True, bool needs_dbias=True, '
    'bool needs_dweight=True) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)'
)


def _present(result: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if result is None else result


@library.custom_op(
    'ssn_plugin::switchable_norm_forward',
    mutates_args=('running_mean', 'running_var'),
    schema=_FORWARD,
)
def switchable_norm_forward(
    x, mean_control, var_control, ratio_map, radius, mean_fixed, var_fixed, mean_choice, var_choice,
    weight, bias, running_mean, running_var, momentum, momentum_tensor, training,
    normalizers, num_groups, correction, eps, mean_selected=None, var_selected=None,
):  # fmt: skip
    """y and the saved vector."""
    y, saved, _ = backend.forward(
        x, mean_control, var_control, ratio_map, radius, mean_fixed, var_fixed, mean_choice,
        var_choice, weight, bias, running_mean, running_var,
        momentum if momentum_tensor is None else momentum_tensor, training,
        normalizers, num_groups, correction, eps, (mean_selected, var_selected),
    )  # fmt: skip
    return y, saved


@switchable_norm_forward.register_fake
def _(
    x, mean_control, var_control, ratio_map, radius, mean_fixed, var_fixed, mean_choice, var_choice,
    weight, bias, running_mean, running_var, momentum, momentum_tensor, training,
    normalizers, num_groups, correction, eps, mean_selected=None, var_selected=None,
):  # fmt: skip
    constant = not training and running_mean is not None
    size = backend.saved_size(
        *x.shape[:2], tuple(normalizers), num_groups, constant, (mean_selected, var_selected)
    )
    return torch.empty_like(backend.laid_out(x)[0]), x.new_empty(size, dtype=torch.float32)


@library.custom_op('ssn_plugin::switchable_norm_backward', mutates_args=(), schema=_BACKWARD)
def switchable_norm_backward(
    dy, x, saved, weight, ratio_map, constant, normalizers, num_groups, correction, eps,
    mean_selected=None, var_selected=None, needs_dx=True, needs_control=True, needs_dbias=True,
    needs_dweight=True,
):  # fmt: skip
    """dx, dmean_control, dvar_control, dweight, dbias; empty where it is not wanted."""
    found = backend.backward(
        dy, x, saved, weight, ratio_map, constant, normalizers, num_groups, correction, eps,
        (mean_selected, var_selected), needs_dx, needs_control, needs_dbias, needs_dweight,
    )  # fmt: skip
    return tuple(_present(result, x) for result in found)


@switchable_norm_backward.register_fake
def _(
    dy, x, saved, weight, ratio_map, constant, normalizers, num_groups, correction, eps,
    mean_selected=None, var_selected=None, needs_dx=True, needs_control=True, needs_dbias=True,
    needs_dweight=True,
):  # fmt: skip
    def vector(size: int, wanted: bool) -> Tensor | None:
        return x.new_empty(size, dtype=torch.float32) if wanted else None

    channels, size = x.shape[1], len(normalizers)
    found = (
        torch.empty_like(backend.laid_out(x)[0]) if needs_dx else None,
        vector(size, needs_control),
        vector(size, needs_control),
        vector(channels, needs_dweight and weight is not None),
        vector(channels, needs_dbias),
    )
    return tuple(_present(result, x) for result in found)
