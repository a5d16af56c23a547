"""Writes a network as one ONNX file for every batch and image size, and runs it."""

import ast
import contextlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ssn_plugin.deploy.quiet import quiet
from ssn_plugin.errors import in_one_line
from ssn_plugin.ops.switchable_norm.exportable import switchable_norm
from ssn_plugin.ops.switchable_norm.statistics import Settings
from ssn_plugin.torch_versions import EXPORTS_EVERY_SIZE

# What torch's exporter writes; asked for an older one, torch 2.13 fails to convert and keeps it.
MIN_OPSET = 18
DEFAULT_OPSET = 20
INPUT = 'input'
# Sizes of the recorded example: all different, and none of 1, which would be taken for a constant.
_EXAMPLE = {0: 2, 1: 3, 2: 256, 3: 320}
_SIZES = {0: 'batch', 2: 'height', 3: 'width'}
_REMEDIES = {0: '--batch N', 2: '--size HEIGHT WIDTH', 3: '--size HEIGHT WIDTH'}
_GRIDS = (torch.ops.aten.adaptive_avg_pool2d.default, torch.ops.aten.adaptive_max_pool2d.default)


class ExportError(Exception):
    """A network that cannot be exported, or not as asked for; its text is one line."""


def check_opset(opset: int) -> None:
    """Say before long work whether a version of the operators is available.

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
    fixed: Mapping[int, int] | None = None,
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
        fixed: Dimension of the input -> the one size that the file is to hold for.

    Raises:
        ExportError: If it cannot be recorded, or not for every batch and image size that is not
            fixed; it names the module, as far as that is known.
    """
    check_opset(opset)
    fixed = fixed or {}
    open_sizes = {dim: name for dim, name in _SIZES.items() if dim not in fixed}
    dynamic = dict.fromkeys(open_sizes, torch.export.Dim.DYNAMIC)
    example = torch.zeros(*(_EXAMPLE | fixed).values())
    decompositions = {torch.ops.aten.group_norm.default: _group_norm}
    with quiet(logging.getLogger('torch')), torch.no_grad():
        try:
            program = torch.export.export(network, (example,), dynamic_shapes=(dynamic,))
            _refuse_grids(program, open_sizes)
            program = program.run_decompositions(decompositions)
            recorded = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=list(outputs),
                # The program has dynamic sizes already; the exporter needs their names.
                dynamic_shapes=(open_sizes,),
                verbose=False,
            )
            recorded.model.metadata_props.update(notes or {})
            recorded.save(path, external_data=False)
        except (OSError, ExportError):
            raise
        except Exception as error:
            # The recorder, the exporter and the network's code raise all kinds of errors.
            module, constant = _at_fault(network, example, dynamic)
            raise ExportError(
                f'cannot be recorded{module and f" in {module}"}: {_first_line(error)}'
                + (_remedy(constant) or _remedy_if(open_sizes))
            ) from error
    found = [size if isinstance(size, int) else 0 for size in recorded.model.graph.inputs[0].shape]
    constant = [dim for dim in open_sizes if found[dim]]
    if constant:
        raise ExportError(
            f'holds for input of {found} alone, expected every batch and image size'
            + _remedy(constant)
        )


def _remedy(constant: Iterable[int]) -> str:
    options = dict.fromkeys(_REMEDIES[dim] for dim in constant)
    return f'; make it for one size by {" ".join(options)}' if options else ''


def _remedy_if(open_sizes: Iterable[int]) -> str:
    """The same where it is not known what fails."""
    remedy = _remedy(open_sizes)
    return remedy.replace(';', '; if that depends on the number or the size of images,', 1)


def _refuse_grids(program: torch.export.ExportedProgram, open_sizes: Mapping[int, str]) -> None:
    """Refuse what pools images of any size to a grid: ONNX has pooling of one window alone."""
    if open_sizes.keys().isdisjoint((2, 3)):
        return
    for node in program.graph.nodes:
        if node.target in _GRIDS and any(size != 1 for size in node.args[1]):
            module = _named([name for name, _ in node.meta['nn_module_stack'].values()][-1])
            grid = ' x '.join(map(str, node.args[1]))
            raise ExportError(
                f'cannot be written for every image size: {module} pools to a grid of {grid}'
                + _remedy([2])
            )


def _at_fault(network: nn.Module, example: Tensor, dynamic: Mapping) -> tuple[str, list[int]]:
    """The innermost module that makes a size constant, or fails; and which sizes are constant.

    It is recorded once more for it, with hooks, which may themselves be in the way of recording.
    """
    running: list[str] = []
    sizes: dict[int, torch.SymInt] = {}
    constant: dict[str, list[int]] = {}

    def look() -> None:
        dims = [dim for dim, size in sizes.items() if _is_constant(size)]
        if dims:
            constant.setdefault(running[-1], dims)

    def enter(module: nn.Module, arguments: tuple, name: str) -> None:
        if not name:
            sizes.update((dim, arguments[0].shape[dim]) for dim in dynamic)
        else:
            look()
        running.append(name)

    def leave(*_: object) -> None:
        look()
        running.pop()

    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name=name)))
        handles.append(module.register_forward_hook(leave))
    with contextlib.suppress(Exception):
        torch.export.export(network, (example,), dynamic_shapes=(dynamic,), strict=False)
    for handle in handles:
        handle.remove()
    if constant:
        module = next(iter(constant))
        return _named(module), constant[module]
    return _named(running[-1]) if running else '', []


def _is_constant(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or size.node.maybe_as_int() is not None


def _named(module: str) -> str:
    """A module's name in the model that the network is a part of."""
    return module.removeprefix('features.')


def run_onnx(path: Path, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """The outputs of ONNX Runtime on the CPU for each input.

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
        graph = _packages()[0].load(str(path)).graph
        module = _module_of(graph, str(error))
        sizes = enumerate(graph.input[0].type.tensor_type.shape.dim)
        raise ExportError(
            f'ONNX Runtime cannot run it{module and f" in {module}"}: {_first_line(error)}'
            + _remedy_if([dim for dim, size in sizes if size.dim_param])
        ) from error


def _module_of(graph, error: str) -> str:
    """The module of torch whose operator an error of ONNX Runtime names."""
    named = re.search(r"Name:'([^']+)'", error)
    for node in graph.node if named else ():
        if node.name == named[1]:
            about = {entry.key: entry.value for entry in node.metadata_props}
            scopes = ast.literal_eval(about.get('pkg.torch.onnx.name_scopes', '[]'))
            return _named(scopes[-2]) if len(scopes) > 1 else ''  # the last is the operator itself
    return ''


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any output, relative to the largest magnitude in that output.

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
    return in_one_line(error)[:300]
