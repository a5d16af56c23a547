"""A trained config and checkpoint as a collapsed pair, compared on images before it is written."""

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from torch import nn

from ssn_plugin.checkpoint.files import (
    check_writable,
    meta_in,
    read_checkpoint,
    weights_in,
    without_stand_ins,
    write_checkpoint,
)
from ssn_plugin.checkpoint.matching import in_names_of
from ssn_plugin.checkpoint.whole_file import whole_file
from ssn_plugin.deploy.collapse import choices_of, replace_ssn
from ssn_plugin.deploy.fold import find_foldable, fold_batch_norms
from ssn_plugin.errors import CheckpointError, InputError, in_one_line
from ssn_plugin.jobs.complexity import Complexity, complexity_of
from ssn_plugin.jobs.configs import load_config
from ssn_plugin.jobs.output_comparison import Comparison, compare_outputs
from ssn_plugin.jobs.sample_images import sample_batches, sample_images
from ssn_plugin.jobs.trained_model import build_model, load_strictly
from ssn_plugin.layers.ssn import SSN
from ssn_plugin.models.collapsed_model import NAME, collapsed_config
from ssn_plugin.models.plain_config import plain_config
from ssn_plugin.version import __version__

# As a part of the largest output. In some fifty layers rounding errors grow to a few 1e-6.
TOLERANCE = 1e-5
# Folded weights are rounded once more, before instead of after they are multiplied by the input.
FOLD_TOLERANCE = 1e-4


class Collapsed(NamedTuple):
    """What :func:`collapse_checkpoint` did.

    Attributes:
        checkpoint: The file written.
        config: The config written beside it.
        layers: What layers became, such as 'LN/BN -> SelectedNorm', and how many.
        folded: BatchNorms that were folded into convolutions.
        undecided: Names of layers that stayed SSN.
        comparison: Of both models on the images.
        before: Parameters and FLOPs of the trained model, for an image of ``size``.
        after: Those of the collapsed one.
        size: Height and width of the image that was counted, as the network got it.
    """

    checkpoint: Path
    config: Path
    layers: Mapping[str, int]
    folded: tuple[str, ...]
    undecided: tuple[str, ...]
    comparison: Comparison
    before: Complexity
    after: Complexity
    size: tuple[int, int]


def collapse_checkpoint(
    config: str,
    checkpoint: str,
    out: str,
    fold: bool = False,
    native: bool = False,
    keep_undecided: bool = False,
    images: Sequence[str] = (),
    count: int = 4,
    tolerance: float | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    options: dict | None = None,
    plain: bool = False,
) -> Collapsed:
    """Collapse the model of a training, and write it with a config that builds it.

    The model that is compared with the trained one is built from the config that is going to be
    written and strictly filled with the weights that are going to be written. Config and checkpoint
    are written together or not at all.

    Args:
        config: Config file of the training.
        checkpoint: Its checkpoint.
        out: File to write, NAME.pth; the config becomes NAME.py.
        fold: Fold BatchNorms into the convolutions before them, as far as the images show that
            nothing else reads what those put out.
        native: As for :func:`ssn_plugin.collapse_ssn`.
        keep_undecided: As for :func:`ssn_plugin.collapse_ssn`.
        images: Files or folders of images to compare on; the config's test data unless given.
        count: How many images of a folder or of the test data.
        tolerance: Largest difference of an output, as a part of the largest output.
            :data:`TOLERANCE` unless given, :data:`FOLD_TOLERANCE` with ``fold``, and none with
            ``native``, which changes outputs.
        overwrite: Replace files of these names.
        allow_pickle: Unpickle code in ``checkpoint``, which is then trusted.
        options: Settings that override the config's, as the training had them.
        plain: Write a pair for the framework alone, where every ``norm_cfg`` can name what its
            layers chose.

    Raises:
        InputError: If the config or the images cannot be used, layers are undecided, the outputs
            differ more than the tolerance, or ``plain`` is not possible.
        CheckpointError: If the checkpoint cannot be read or does not fit, or the files cannot be
            written.
    """
    written = _check_places(config, checkpoint, out, overwrite)
    if plain and (fold or keep_undecided):
        raise InputError('--plain: goes neither with --fold nor with --keep-undecided')
    settings = load_config(config, options)
    if settings.get('model') and settings.model.get('type') == NAME:
        raise InputError(f'config: {config} is that of a collapsed model')
    loaded = read_checkpoint(checkpoint, allow_pickle)
    weights = weights_in(loaded, checkpoint)
    chosen_images = sample_images(settings, images, count)
    trained = build_model(settings, config).eval()
    layers = {name: layer for name, layer in trained.named_modules() if isinstance(layer, SSN)}
    if not layers:
        raise InputError(f'config: the model of {config} has no SSN layers')
    load_strictly(trained, weights, checkpoint, config)
    try:
        choices = choices_of(trained, keep_undecided)
    except ValueError as error:
        raise InputError(f'{error}; --keep-undecided leaves them as they are') from error
    # Of what torch computes otherwise (correction=1) the comparison tells.
    collapsed = replace_ssn(copy.deepcopy(trained), choices, native or plain)
    kinds = _kinds(choices, collapsed)
    folded = []
    if fold:
        batches = list(sample_batches(settings, chosen_images))
        folded = find_foldable(
            collapsed, lambda model: [model.test_step(copy.deepcopy(batch)) for batch in batches]
        )
        fold_batch_norms(collapsed, folded)
    state = collapsed.state_dict()

    new = (
        plain_config(settings, layers)
        if plain
        else collapsed_config(settings, choices, native, folded)
    )
    text, new = _as_text(new, config)
    again = build_model(new, written[1]).eval()
    if plain:  # bn1 for sn1
        state = in_names_of(again.state_dict(), state).state
    load_strictly(again, state, out, written[1])
    comparison = compare_outputs(trained, again, sample_batches(settings, chosen_images))
    if tolerance is None and not native:
        tolerance = FOLD_TOLERANCE if fold else TOLERANCE
    if tolerance is not None and not comparison.largest <= tolerance:
        raise InputError(
            f'{out}: not written: outputs of both models differ by '
            f'{comparison.largest:.1e} of the largest, expected at most {tolerance:.1e}'
        )
    batch = next(sample_batches(settings, chosen_images))
    shape = trained.data_preprocessor(copy.deepcopy(batch), False)['inputs'].shape
    result = Collapsed(
        *written,
        kinds,
        tuple(norm for _, norm in folded),
        tuple(name for name in layers if name not in choices),
        comparison,
        complexity_of(trained, batch),
        complexity_of(again, batch),
        tuple(shape[-2:]),
    )
    _write({'meta': _meta(loaded, text, choices), 'state_dict': state}, text, *written, overwrite)
    return result


def _check_places(config: str, checkpoint: str, out: str, overwrite: bool) -> tuple[Path, Path]:
    path = Path(out)
    if path.suffix != '.pth':
        raise CheckpointError(f'{out}: expected a name that ends in .pth')
    beside = path.with_suffix('.py')
    for place in (path, beside):
        for source in (config, checkpoint):
            if place.exists() and os.path.exists(source) and os.path.samefile(place, source):
                raise CheckpointError(f'{place}: would replace what it is made from')
        check_writable(place, overwrite)
    return path, beside


def _as_text(settings: Config, config: str) -> tuple[str, Config]:
    """A config as text, and what is read of that."""
    try:
        text = settings.pretty_text
        return text, Config.fromstring(text, '.py')
    except Exception as error:  # mmengine, its formatter and the config's code raise anything
        raise InputError(
            f'config: {config} cannot be written as text: {in_one_line(error)}'
        ) from error


def _kinds(choices: Mapping[str, Sequence[str]], model: nn.Module) -> Counter:
    layers = dict(model.named_modules())
    return Counter(
        f'{mean if mean == var else f"{mean}/{var}"} -> {type(layers[name]).__name__}'
        for name, (mean, var) in choices.items()
    )


def _meta(loaded: Mapping, text: str, choices: Mapping[str, tuple[str, str]]) -> dict:
    """What inference reads from a checkpoint: classes, and the config to build the model by.

    Also what layers chose, for of their weights one cannot tell LN from GN.
    """
    kept = without_stand_ins(meta_in(loaded)) if 'state_dict' in loaded else {}
    own = {'cfg': text, 'collapsed': dict(choices), 'ssn_plugin': __version__}
    return {**kept, **own, 'made_by': 'collapse'}


def _write(checkpoint: dict, text: str, path: Path, beside: Path, overwrite: bool) -> None:
    try:
        # The config is whole before the checkpoint is renamed, and is renamed next.
        with whole_file(beside) as temporary:
            temporary.write_text(text, encoding='utf-8')
            write_checkpoint(checkpoint, path, overwrite)
    except OSError as error:
        raise CheckpointError(f'{beside}: cannot be written: {error.strerror}') from error
