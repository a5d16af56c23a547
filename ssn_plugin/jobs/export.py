"""The network of a trained config as an ONNX file, compared with torch on images."""

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn import functional as F

from ssn_plugin.checkpoint.files import check_writable, read_checkpoint, weights_in
from ssn_plugin.checkpoint.whole_file import whole_file
from ssn_plugin.deploy.collapse import collapse_ssn
from ssn_plugin.deploy.constant_ratios import hold_ratios
from ssn_plugin.deploy.onnx_file import (
    DEFAULT_OPSET,
    ExportError,
    check_opset,
    relative_difference,
    run_onnx,
    write_onnx,
)
from ssn_plugin.errors import CheckpointError, InputError, in_one_line
from ssn_plugin.jobs.configs import load_config
from ssn_plugin.jobs.sample_images import sample_batches, sample_images
from ssn_plugin.jobs.trained_model import build_model, load_strictly, model_settings
from ssn_plugin.layers.switchable import SwitchableNorm

# As a part of the largest value of an output.
TOLERANCE = 1e-4
_IMAGES = 2


class Exported(NamedTuple):
    """What :func:`export_onnx` did.

    Attributes:
        path: The file written.
        outputs: Names of its outputs.
        layers: 'decided' and 'undecided' SSN and SN layers, and how many.
        difference: Largest difference from torch, relative to the largest value of an output.
        shapes: Of the inputs that were compared.
    """

    path: Path
    outputs: Sequence[str]
    layers: Mapping[str, int]
    difference: float
    shapes: Sequence[tuple[int, ...]]


class Features(nn.Module):
    """What backbone and neck make of images, as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.neck = getattr(model, 'neck', None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of normalised images, (N, 3, H, W)."""
        features = self.for_head(x)
        return (features,) if isinstance(features, Tensor) else tuple(features)

    def for_head(self, x: Tensor) -> Tensor | Sequence[Tensor]:
        """The same as a head gets it: DDRNet and PIDNet give theirs one map, not a tuple."""
        features = self.backbone(x)
        return features if self.neck is None else self.neck(features)


class Logits(nn.Module):
    """What an encoder-decoder makes of images: a logit per class and pixel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.features = Features(model)
        self.decode_head = model.decode_head

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Logits of normalised images, (N, 3, H, W), resized to them as for the predictions."""
        logits = self.decode_head(self.features.for_head(x))
        if isinstance(logits, tuple):  # EncNet tells which classes there are besides
            logits = logits[0]
        corners = self.decode_head.align_corners
        return (F.interpolate(logits, x.shape[2:], mode='bilinear', align_corners=corners),)


def export_onnx(
    config: str,
    checkpoint: str,
    out: str,
    opset: int = DEFAULT_OPSET,
    images: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    allow_pickle: bool = False,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
) -> Exported:
    """Write backbone and neck, or a whole encoder-decoder, for every batch and image size.

    Decided SSN layers are written as what they chose, the others and SN as mixtures with constant
    ratios. ONNX Runtime then gets images alone and as a batch, and its outputs are compared with
    those of the model as it was trained.

    Args:
        config: Config file, of a training or a collapsed one.
        checkpoint: Its checkpoint.
        out: File to write, NAME.onnx.
        opset: Version of ONNX's operators.
        images: Files or folders of images to compare on; the config's test data unless given.
        tolerance: Largest difference, as a part of the largest value of an output.
        overwrite: Replace a file of this name.
        allow_pickle: Unpickle code in ``checkpoint``, which is then trusted.
        size: Height and width that the file is to hold for alone, as a network needs that pools to
            a grid. The images are resized to it.
        batch: Number of images that the file is to hold for alone.

    Raises:
        ExportError: If the network cannot be exported, or differs more than the tolerance.
        InputError: If the config or the images cannot be used.
        CheckpointError: If the checkpoint cannot be read or does not fit, or the file cannot be
            written.
    """
    check_opset(opset)
    if not out.endswith('.onnx'):
        raise CheckpointError(f'{out}: expected a name that ends in .onnx')
    check_writable(out, overwrite)
    settings = load_config(config)
    chosen = sample_images(settings, images, _IMAGES)
    model = build_model(settings, config).eval()
    weights = weights_in(read_checkpoint(checkpoint, allow_pickle), checkpoint)
    load_strictly(model, weights, checkpoint, config)
    network, name = _network_of(model, config)
    inputs = list(_inputs(model, settings, chosen, size, batch))
    outputs = [f'{name}{k}' for k in range(_count_outputs(network, inputs[0], config))]
    outputs = outputs if name == 'feat' else [name]
    layers = Counter(
        'undecided' if None in layer.selected else 'decided'
        for layer in network.modules()
        if isinstance(layer, SwitchableNorm)
    )
    recorded = hold_ratios(collapse_ssn(copy.deepcopy(network), keep_undecided=True))
    preprocessing = model_settings(settings).get('data_preprocessor')
    notes = {'preprocessing': json.dumps(preprocessing, default=str)}
    fixed = ({} if batch is None else {0: batch}) | dict(zip((2, 3), size or (), strict=False))
    try:
        with whole_file(out) as temporary:
            write_onnx(recorded, outputs, temporary, opset, notes, fixed)
            difference = _difference(temporary, network, inputs)
            if not difference <= tolerance:
                raise ExportError(
                    f'{out}: not written: ONNX Runtime differs from torch by {difference:.1e} of '
                    f'the largest value, expected at most {tolerance:.1e}'
                )
    except OSError as error:
        raise CheckpointError(f'{out}: cannot be written: {error.strerror or error}') from error
    return Exported(Path(out), outputs, layers, difference, [tuple(x.shape) for x in inputs])


def _network_of(model: nn.Module, config: str) -> tuple[nn.Module, str]:
    """The part that is exported, in evaluation, and what its outputs are called."""
    if not isinstance(getattr(model, 'backbone', None), nn.Module):
        raise InputError(f'config: the {type(model).__name__} of {config} has no backbone')
    head = getattr(model, 'decode_head', None)
    if head is None:
        return Features(model).eval(), 'feat'
    if isinstance(head, nn.ModuleList):
        raise InputError(
            f'config: the {type(model).__name__} of {config} has {len(head)} decode heads, '
            'expected one'
        )
    return Logits(model).eval(), 'logits'


def _inputs(
    model: nn.Module,
    config: Config,
    images: Sequence[str],
    size: tuple[int, int] | None,
    batch: int | None,
) -> Iterator[Tensor]:
    """Images as the model's backbone gets them: each alone, then the first twice, once mirrored.

    With a fixed batch there are so many of each instead.
    """
    both = None
    for sample in sample_batches(config, images):
        x = model.data_preprocessor(sample, False)['inputs']
        x = x if size is None else F.interpolate(x, size, mode='bilinear')
        pair = torch.cat((x, x.flip(-1)))
        both = pair if both is None else both
        yield x if batch is None else pair.repeat(batch, 1, 1, 1)[:batch]
    if batch is None:
        yield both


def _count_outputs(network: nn.Module, x: Tensor, config: str) -> int:
    try:
        with torch.no_grad():
            outputs = network(x)
    except Exception as error:
        # Heads that need more than features raise all kinds of errors.
        raise InputError(
            f'config: the network of {config} does not run on images alone: {in_one_line(error)}'
        ) from error
    if not all(isinstance(output, Tensor) for output in outputs):
        raise InputError(f'config: the network of {config} puts out other things than tensors')
    return len(outputs)


def _difference(path: Path, network: nn.Module, inputs: Sequence[Tensor]) -> float:
    worst = 0.0
    for x in inputs:  # one by one, as segmentation logits are large
        with torch.no_grad():
            expected = network(x)
        worst = max(worst, relative_difference(run_onnx(path, [x])[0], expected))
    return worst
