"""CollapsedSSN: a config's model whose SSN layers are the normalizers they chose."""

import copy
from collections.abc import Mapping, Sequence

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from ssn_plugin.analysis.config_entries import as_list, type_name
from ssn_plugin.deploy.collapse import replace_ssn
from ssn_plugin.deploy.fold import fold_batch_norms
from ssn_plugin.models.pretrained import pretrained_entries, without_pretrained

NAME = 'CollapsedSSN'
# Hooks of ours that a collapsed model does not need.
_TRAINING_HOOKS = (
    'SSNRadiusHook',
    'SSNRatioHook',
    'SSNResumeHook',
    'SSNStartHook',
    'PreciseStatsHook',
)


def build_collapsed_ssn(
    base: str,
    choices: Mapping[str, Sequence[str]],
    native: bool = False,
    folded: Sequence[tuple[str, str]] = (),
    **model,
) -> nn.Module:
    """Build a model and replace its SSN layers, so that a collapsed checkpoint fills it.

    It stands in the root registry under 'CollapsedSSN'. ``tools/collapse.py`` writes configs with
    it, in which everything but ``type`` stays where it was: what reads ``config.model.backbone`` or
    ``config.model.test_cfg`` finds them.

    Args:
        base: The ``type`` that the model had, such as 'MaskRCNN'.
        choices: Name of an SSN layer -> the normalizers of its mean and of its variance.
        native: As for :func:`ssn_plugin.collapse_ssn`.
        folded: Convolutions and BatchNorms as for :func:`ssn_plugin.fold_batch_norms`.
        **model: The arguments of ``base``.

    Returns:
        A model of the class ``base``.

    Raises:
        ValueError: If the model has no SSN of a name in ``choices``, or no layers of names in
            ``folded``.

    Example:
        >>> from mmengine.registry import MODELS
        >>> import ssn_plugin
        >>> backbone = MODELS.build(dict(
        ...     type='CollapsedSSN', base='SSNResNet', depth=18, choices={'sn1': ('LN', 'LN')}))
        >>> type(backbone.sn1).__name__
        'GroupNorm'
    """
    built = replace_ssn(MODELS.build(dict(type=base, **model)), choices, native)
    return fold_batch_norms(built, folded)


def collapsed_config(
    config: Config,
    choices: Mapping[str, Sequence[str]],
    native: bool = False,
    folded: Sequence[tuple[str, str]] = (),
) -> Config:
    """The config of a model after its collapse; that of the training is not changed.

    Returns:
        A config without pre-trained weights and without the hooks that an SSN training needs.
    """
    config = inference_config(config)
    model = config.model
    kind = model.type
    # In configs of the new style the type is a class.
    model.base = kind if isinstance(kind, str) else f'{kind.__module__}.{kind.__qualname__}'
    model.type = NAME
    model.choices = {name: tuple(pair) for name, pair in choices.items()}
    if native:
        model.native = True
    if folded:
        model.folded = [tuple(pair) for pair in folded]
    imports = config.get('custom_imports') or {}
    names = as_list(imports.get('imports'))
    if 'ssn_plugin' not in names:
        config.custom_imports = {**imports, 'imports': [*names, 'ssn_plugin']}
    return config


def inference_config(config: Config) -> Config:
    """A copy without pre-trained weights, and without hooks whose work ends with the training."""
    config = copy.deepcopy(config)
    _drop_pretrained(config.model)
    config.load_from = None
    config.resume = False
    if config.get('custom_hooks'):
        config.custom_hooks = [
            hook for hook in config.custom_hooks if type_name(hook) not in _TRAINING_HOOKS
        ]
    for name, hook in list((config.get('default_hooks') or {}).items()):
        if hook and type_name(hook) in _TRAINING_HOOKS:
            del config.default_hooks[name]
    return config


def _drop_pretrained(node: object) -> None:
    """Take out the weights that a part of a model starts from."""
    if isinstance(node, dict):
        if isinstance(node.get('pretrained'), str):
            node['pretrained'] = None
        if any(pretrained_entries(node.get('init_cfg'))):
            node['init_cfg'] = without_pretrained(node['init_cfg']) or None
        for child in node.values():
            _drop_pretrained(child)
    elif isinstance(node, list | tuple):
        for child in node:
            _drop_pretrained(child)
