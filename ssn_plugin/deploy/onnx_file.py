"""Writes a network as one ONNX file for every batch and image size, and runs it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ssn_plugin.deploy.quiet import quiet
from ssn_plugin.ops.switchable_norm.exportable import switchable_norm
from ssn_plugin.ops.switchable_norm.statistics import Settings
from ssn_plugin.torch_versions import EXPORTS_EVERY_SIZE

# What torch's exporter writes; asked for an older one, torch 2.13 fails to convert and keeps it.
MIN_OPSET = 18
DEFAULT_OPSET = 20
INPUT = 'input'
# Sizes of the recorded example: all different, and none of 1, which would be taken for a constant.
_EXAMPLE = (2, 3, 256, 320)
_SIZES = {0: 'batch', 2: 'height', 3: 'width'}


class ExportError(Exception):
    """A network that cannot be exported, or not as asked for; its text is one line."""


def check_opset(opset: int) -> None:
    """Say before long work whether a version of the operators is available.

    Args:
        opset: The version.

    Raises:
        ExportError: If it is not, or the packages of the extra 'deploy' are missing.
    """
    onnx, _ = _packages()
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise ExportError(f'opset: got {opset}, expected {MIN_OPSET} to {newest}')


def write_onnx(
    network: nn.Module,
    outputs: Sequence[str],
    path: Path,
    opset: int = DEFAULT_OPSET,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Record a network of images (N, 3, H, W) and write it as one file.

    Group norm is written as means and deviations from them: by torch's exporter it would become an
    InstanceNormalization, whose result over 4 million elements is off by 1e-3 in ONNX Runtime.

    Args:
        network: In evaluation, without SSN or SN layers (:func:`ssn_plugin.hold_ratios`); returns a
            tensor or a tuple of them. The input is called 'input'.
        outputs: Names of what it returns.
        path: File to write.
        opset: Version of ONNX's operators.
        notes: What else the file is to say, as its metadata.

    Raises:
        ExportError: If it cannot be recorded, or not for every batch and image size.
    """
    check_opset(opset)
    dynamic = dict.fromkeys(_SIZES, torch.export.Dim.DYNAMIC)
    decompositions = {torch.ops.aten.group_norm.default: _group_norm}
    with quiet(logging.getLogger('torch')), torch.no_grad():
        try:
            program = torch.export.export(
                network, (torch.zeros(_EXAMPLE),), dynamic_shapes=(dynamic,)
            ).run_decompositions(decompositions)
            recorded = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=list(outputs),
                # The program has dynamic sizes already; the exporter needs their names.
                dynamic_shapes=(_SIZES,),
                verbose=False,
            )
            recorded.model.metadata_props.update(notes or {})
            recorded.save(path, external_data=False)
        except OSError:
            raise
        except Exception as error:
            # The recorder, the exporter and the network's code raise all kinds of errors.
            raise ExportError(f'cannot be recorded: {_first_line(error)}') from error
    found = [size if isinstance(size, int) else 0 for size in recorded.model.graph.inputs[0].shape]
    if any(found[dim] for dim in _SIZES):
        raise ExportError(f'holds for input of {found} alone, expected every batch and image size')


def run_onnx(path: Path, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """The outputs of ONNX Runtime on the CPU for each input.

    Args:
        path: The ONNX file.
        inputs: Of shape (N, 3, H, W).

    Raises:
        ExportError: If it cannot be run.
    """
    _, runtime = _packages()
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about its own optimisations
    try:
        session = runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        return [
            [torch.from_numpy(y) for y in session.run(None, {INPUT: x.numpy()})] for x in inputs
        ]
    except Exception as error:
        # The runtime has an exception class for each of its status codes, without a common base.
        raise ExportError(f'ONNX Runtime cannot run it: {_first_line(error)}') from error


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any output, relative to the largest magnitude in that output.

    Args:
        found: Tensors.
        expected: As many, of the same shapes.

    Returns:
        Infinity if shapes differ, or a difference is not a number.
    """
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            return float('inf')
        scale = theirs.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = float((ours - theirs).abs().max() / scale)
        worst = max(worst, difference if difference == difference else float('inf'))
    return worst


def _packages() -> tuple:
    if not EXPORTS_EVERY_SIZE:
        raise ExportError(f'torch: got {torch.__version__}, expected 2.6 or newer to write ONNX')
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter imports it)
    except ImportError as error:
        raise ExportError(
            f'{error.name} is missing: pip install onnx onnxruntime onnxscript'
        ) from error
    return onnx, onnxruntime


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    name = {1: 'LN', x.shape[1]: 'IN'}.get(num_groups, 'GN')
    settings = Settings((name,), num_groups, 0, eps)
    return switchable_norm(x, [1.0], [1.0], weight, bias, None, settings)


def _first_line(error: Exception) -> str:
    while error.__cause__ is not None:  # the exporter wraps the true cause into advice
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {(lines or [""])[0][:300]}'
