"""Errors of torch and of the frameworks that do not tell their cause, in one line that does."""

import re
import traceback
from collections.abc import Iterator

from mmengine.runner import BaseLoop
from torch import nn

from ssn_plugin.errors import in_one_line


def explained(error: Exception) -> str | None:
    """What an error of a run means and what to do; None if it tells that itself.

    Example:
        >>> from ssn_plugin.jobs.explained_errors import explained
        >>> explained(IndexError('Target 25 is out of bounds.')).partition(':')[0]
        'labels'
    """
    text = str(error)
    if 'Expected more than 1 value per channel' in text:
        where = _innermost_module(error)
        return (
            f'{where or "BatchNorm"}: got one value per channel, expected more in training: one '
            'image of 1 x 1 has no batch statistics; take at least 2 images per process, or '
            "norm_cfg=dict(type='SSN', normalizers=('LN', 'GN', 'BN')) in this part of the model"
        )
    if found := re.search(r'Target (-?\d+) is out of bounds', text):
        return (
            f'labels: got {found[1]}, expected labels below the num_classes of their head: set '
            'num_classes to the number of classes, or map the labels to 0 ... num_classes - 1, and '
            'those to be ignored to 255 in a segmentation'
        )
    if 'Duplicate key is not allowed among bases' in text:
        return (
            f'_base_: two files set {text.partition("keys: ")[2].strip(chr(34))}, which mmengine '
            'refuses: take ssn_training.py out of _base_ and write its entries into this config, '
            'its hooks at the end of custom_hooks (docs/convert.md)'
        )
    if 'mmsegmentation is not installed' in text:
        return (
            '_base_: mmseg:: needs the distribution mmsegmentation, which onedl-mmsegmentation is '
            "not; write the path instead, as in _base_ = [__import__('mmseg').__path__[0] + "
            "'/.mim/configs/FOLDER/CONFIG.py']"
        )
    return None


def before_the_work(error: BaseException) -> str | None:
    """What to say of an error from before a loop began to run; None if one had.

    Until then mmengine builds what the config names, so the config is what to look at.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        inside = isinstance(frame.f_locals.get('self'), BaseLoop)
        if inside and frame.f_code.co_name != '__init__':
            return None
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f'config: the run cannot be built: {in_one_line(error)} '
        f'({place.filename}, line {place.lineno})'
    )


def building(error: BaseException) -> str:
    """The modules that were being built when an error came up, from outside in."""
    found: list[nn.Module] = []
    for module, function in _modules_in(error):
        if function == '__init__' and not any(module is other for other in found):
            found.append(module)
    return ' > '.join(type(module).__name__ for module in found)


def _innermost_module(error: BaseException) -> str | None:
    """The name, in the whole model, of the module whose forward pass failed."""
    modules = [module for module, function in _modules_in(error) if function == 'forward']
    if not modules:
        return None
    names = {id(module): name for name, module in modules[0].named_modules()}
    return names.get(id(modules[-1])) or type(modules[-1]).__name__


def _modules_in(error: BaseException) -> Iterator[tuple[nn.Module, str]]:
    """The modules whose methods are in the traceback of an error and of those it comes from."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            module = trace.tb_frame.f_locals.get('self')
            if isinstance(module, nn.Module):
                yield module, trace.tb_frame.f_code.co_name
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
