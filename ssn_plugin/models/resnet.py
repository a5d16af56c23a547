"""SSNResNet: the ResNet of a framework, made that of the released SSN weights."""

import importlib
import importlib.util
import logging

import torch
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ssn_plugin.layers.switchable import SwitchableNorm
from ssn_plugin.models.pretrained import (
    checked_weights,
    load_pretrained,
    pretrained_entries,
    without_pretrained,
)

# For each there is a module FRAMEWORK_resnet in this folder.
_FRAMEWORKS = ('mmdet', 'mmseg', 'mmpretrain', 'mmpose')


class _StemPool(nn.MaxPool2d):
    """A pool of 3 x 3 by steps of 2 that every version of torch can write to ONNX.

    Where it rounds up, torch 2.1 fails for sizes that are not fixed. One more row and column, which
    no maximum takes, and rounding down are the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.ceil_mode and torch.onnx.is_in_onnx_export():
            padded = nn.functional.pad(x, (0, 1, 0, 1), value=-float('inf'))
            return nn.functional.max_pool2d(padded, self.kernel_size, self.stride)
        return super().forward(x)


class SSNResNetMixin:
    """Turns a framework's ResNet into the one the released SSN weights were trained with.

    The stem pools by ``MaxPool2d(3, stride=2, padding=0, ceil_mode=True)``, one pixel off the usual
    one, and ``norm_eval`` reaches SSN, which the framework's check for BatchNorm skips. Stages
    frozen by ``frozen_stages`` keep their ratios: ``set_radius`` leaves layers without gradient
    alone.

    ``init_cfg=dict(type='Pretrained', checkpoint=FILE)`` must fill the whole backbone: a missing,
    unexpected or misshapen key is an error, where mmengine logs a warning and leaves the layer
    random. The classifier of the file (``fc``) and stages beyond ``num_stages`` are left out.

    Args:
        norm_cfg: As in the framework, ``dict(type='SSN')`` unless given.
        stem_padding: 0 for the stem pool above; 1 for that of every other ResNet, which weights
            made with BatchNorm (``bn2ssn://``) need.
        **kwargs: As in the framework.

    Raises:
        ValueError: If ``stem_padding`` is not 0 or 1.
        CheckpointError: By ``init_weights``, if the checkpoint cannot be read or does not match.
    """

    def __init__(
        self, *args, norm_cfg: dict | None = None, stem_padding: int = 0, **kwargs
    ) -> None:
        if stem_padding not in (0, 1):
            raise ValueError(f'stem_padding: got {stem_padding!r}, expected 0 or 1')
        norm_cfg = dict(type='SSN', requires_grad=True) if norm_cfg is None else norm_cfg
        super().__init__(*args, norm_cfg=norm_cfg, **kwargs)
        self.stem_padding = stem_padding
        self.maxpool = _StemPool(3, stride=2, padding=stem_padding, ceil_mode=stem_padding == 0)

    def init_weights(self) -> None:
        """As the framework's, after every key of a pretrained checkpoint has been accounted for."""
        entries = [] if self._is_init else list(pretrained_entries(self.init_cfg))
        found = [checked_weights(self, entry) for entry in entries]
        init_cfg, self.init_cfg = self.init_cfg, without_pretrained(self.init_cfg)
        try:
            super().init_weights()
        finally:
            self.init_cfg = init_cfg
        for entry, (state, line) in zip(entries, found, strict=True):
            load_pretrained(self, state, entry['checkpoint'])
            print_log(line, logger='current')

    def train(self, mode: bool = True) -> nn.Module:
        """As the framework's ResNet, with ``norm_eval`` for SSN and SN."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, SwitchableNorm):
                    module.eval()
        return self


def build_ssn_resnet(**kwargs) -> nn.Module:
    """Build the SSNResNet of the codebase in whose scope a model is built.

    It stands in the root registry under 'SSNResNet', so that one name serves mmdet, mmseg,
    mmpretrain and mmpose, and none is imported before it is needed. In any other scope it is that
    of the first of them that is installed, and says so, as defaults such as ``norm_eval`` differ.

    Args:
        **kwargs: Arguments of the ResNet of mmdet (``default_scope='mmdet'``) or of mmseg
            (``default_scope='mmseg'``, which adds ``multi_grid`` and ``contract_dilation``) or of
            mmpretrain (``default_scope='mmpretrain'``, which adds ``drop_path_rate``) or of mmpose.
            ``norm_cfg`` is ``dict(type='SSN')`` unless given.

    Returns:
        A backbone of that codebase.

    Raises:
        ImportError: If the codebase of the scope is not installed.

    Example:
        >>> from mmengine.registry import MODELS, init_default_scope
        >>> import ssn_plugin
        >>> init_default_scope('mmdet')  # Runner and the inference APIs do this
        >>> backbone = MODELS.build(dict(type='SSNResNet', depth=18))
        >>> type(backbone.sn1).__name__
        'SSN'
    """
    current = DefaultScope.get_current_instance()
    scope = None if current is None else current.scope_name
    if scope not in _FRAMEWORKS:
        # Code that builds a backbone without a Runner may have set no scope.
        installed = (framework for framework in _FRAMEWORKS if importlib.util.find_spec(framework))
        taken = next(installed, _FRAMEWORKS[0])
        if scope not in (None, 'mmengine'):
            print_log(
                f'SSNResNet: {scope} has none of its own; that of {taken} is built, with the '
                f'defaults of {taken}{", norm_eval=True among them" * (taken == "mmdet")}',
                logger='current',
                level=logging.WARNING,
            )
        scope = taken
    return importlib.import_module(f'ssn_plugin.models.{scope}_resnet').SSNResNet(**kwargs)
