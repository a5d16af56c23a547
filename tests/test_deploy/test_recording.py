"""torch.export and torch.jit.trace of collapsed layers hold for every size of input."""

import copy
import warnings

import pytest
import torch
from random_state import randomize_affine_and_running
from since import TORCHSCRIPT
from torch import nn

from ssn_plugin import SN, SSN, SSN1d, SyncSSN, collapse_ssn, hold_ratios, set_radius
from ssn_plugin.torch_versions import EXPORTS_EVERY_SIZE

NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
KINDS = ['IN', 'LN', 'BN', 'GN', 'LN/BN', 'GN/IN', 'a mixture', 'SN']


def network(kind: str, correction: int, layer: type = SSN) -> nn.Sequential:
    """A norm of a kind, collapsed or with its ratios held, and all before it."""
    settings = dict(normalizers=NORMALIZERS, num_groups=3, correction=correction)
    norm = (SN if kind == 'SN' else layer)(6, **settings)
    randomize_affine_and_running(norm)
    with torch.no_grad():
        mean, _, var = kind.partition('/')
        for control, name in zip(
            (norm.mean_weight, norm.var_weight), (mean, var or mean), strict=True
        ):
            if name in NORMALIZERS:
                control[NORMALIZERS.index(name)] = 2
            else:
                control.normal_(std=0.2)
    if '/' in kind or kind in NORMALIZERS:
        set_radius(norm, 0.3)
    return nn.Sequential(norm).eval()


def recorded(model: nn.Module, x: torch.Tensor) -> list:
    found = [torch.jit.trace(model, x, check_trace=False)]
    if EXPORTS_EVERY_SIZE:
        sizes = {dim: torch.export.Dim.DYNAMIC for dim in range(x.dim()) if dim != 1}
        found.append(torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module())
    return found


@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('kind', KINDS)
def test_every_size(kind, correction):
    model = network(kind, correction)
    inputs = [
        torch.randn(s) + 1 for s in ((1, 6, 9, 13), (3, 6, 1, 1), (1, 6, 1, 1), (4, 6, 31, 1))
    ]
    expected = [model(x) for x in inputs]
    hold_ratios(collapse_ssn(model, keep_undecided=True))
    for run in recorded(model, torch.randn(2, 6, 5, 7)):
        for x, y in zip(inputs, expected, strict=True):
            torch.testing.assert_close(run(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', ['IN', 'LN', 'BN', 'LN/BN', 'a mixture'])
def test_rows_of_any_length(kind):
    model = network(kind, 0, SSN1d)
    inputs = [torch.randn(s) + 1 for s in ((3, 6, 40), (3, 6, 1))]
    expected = [model(x) for x in inputs]
    hold_ratios(collapse_ssn(model, keep_undecided=True))
    for run in recorded(model, torch.randn(2, 6, 5)):
        for x, y in zip(inputs, expected, strict=True):
            torch.testing.assert_close(run(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('correction', [0, 1])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('layer', [SSN, SyncSSN])
def test_tracing_what_was_not_collapsed(kind, correction, layer):
    """In evaluation the ratios are constants, whether the layer is decided or not."""
    model = network(kind, correction, layer)
    inputs = [torch.randn(s) + 1 for s in ((1, 6, 9, 13), (3, 6, 1, 1), (4, 6, 31, 1))]
    traced = torch.jit.trace(model, torch.randn(2, 6, 5, 7))
    frozen = torch.jit.freeze(traced)
    held = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('_weight'):  # of which the recorded ratios know nothing any more
                parameter.add_(torch.arange(4.0))
    for x in inputs:
        for run in (traced, frozen):
            torch.testing.assert_close(run(x), held(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('opset', [11, 17])
@pytest.mark.parametrize('kind', KINDS)
def test_the_torchscript_exporter_takes_what_was_not_collapsed(kind, opset, tmp_path):
    pytest.importorskip('onnx')
    runtime = pytest.importorskip('onnxruntime')
    norm = network(kind, 0)
    # Used twice, as by a head that serves every level of a pyramid.
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), norm).eval()
    path = str(tmp_path / 'net.onnx')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            model, (torch.randn(2, 3, 20, 24),), path, opset_version=opset, **TORCHSCRIPT,
            input_names=['x'], output_names=['y'], dynamic_axes={'x': {0: 'n', 2: 'h', 3: 'w'}},
        )  # fmt: skip
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for shape in ((1, 3, 40, 31), (3, 3, 3, 3)):
        x = torch.randn(shape)
        (found,) = session.run(None, {'x': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-5, atol=1e-5)
