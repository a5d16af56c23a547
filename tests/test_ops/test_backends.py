"""The choice of the backend: by device, by environment variable, and what is said of it."""

import contextlib
import copy
import logging
import os
import subprocess
import sys

import pytest
import torch
from since import require_kernels
from torch._subclasses.fake_tensor import FakeTensorMode

from ssn_plugin import SN, SSN, set_radius, switchable_norm
from ssn_plugin.ops.switchable_norm import dispatch as ops
from ssn_plugin.ops.switchable_norm.ratios import has_values
from ssn_plugin.ops.switchable_norm.triton import direct
from ssn_plugin.ops.switchable_norm.triton import launch as switchable_norm_triton
from ssn_plugin.torch_versions import COMPILES_LAYERS, VERSION

require_kernels()
pytestmark = pytest.mark.filterwarnings('ignore:.*encountered in:RuntimeWarning')  # of NumPy
SHAPE = (3, 6, 5, 4)


def imported(value: str) -> subprocess.CompletedProcess:
    code = (
        'import sys, torch\n'
        'from ssn_plugin import SSN\n'
        'SSN(4)(torch.randn(2, 4, 3, 3)).mean().backward()\n'
        'print(any(name.endswith("triton.kernels") for name in sys.modules))\n'
    )
    environment = {'SSN_BACKEND': value, 'TRITON_INTERPRET': '1'}
    return subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(('value', 'runs'), [('', False), ('eager', False), ('triton', True)])
def test_environment_variable(value, runs):
    result = imported(value)
    assert result.stdout == f'{runs}\n', result.stderr


def test_bad_environment_variable_is_one_line():
    result = imported('cuda')
    last = result.stderr.strip().splitlines()[-1]
    assert last == "ValueError: SSN_BACKEND: got 'cuda', expected 'eager' or 'triton'"


def results(layer, x, upstream, backend, monkeypatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(ops, '_BACKEND', backend)
    x = x.detach().requires_grad_()
    y = layer(x)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters.values()], upstream)
    found = dict(zip(('y', 'x', *parameters), (y, *gradients), strict=True))
    return found | {f'buffer {name}': b.clone() for name, b in layer.named_buffers()}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('radius', [0.0, 0.3, 1.0, None])
def test_backends_agree(radius, momentum, training, monkeypatch):
    # The kernels through the interpreter: what they are given and what becomes of their results.
    layer = SN(6, momentum=momentum) if radius is None else SSN(6, momentum=momentum)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.1)
    if radius is not None:
        set_radius(layer, radius)
    again = copy.deepcopy(layer.train(training))
    x, upstream = torch.randn(2, *SHAPE)
    expected = results(layer, x, upstream, 'eager', monkeypatch)
    found = results(again, x, upstream, 'triton', monkeypatch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    if again.selected != ('BN', 'BN'):  # which batch norm computes
        assert 'Fused' in type(again(x).grad_fn).__name__


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('affine', [True, False])
def test_a_layer_decided_on_bn_is_batch_norm(affine, training, monkeypatch):
    monkeypatch.setattr(ops, '_BACKEND', 'triton')
    monkeypatch.setattr(direct, 'run', None)  # no kernel is launched
    layer, plain = SSN(6, affine=affine), torch.nn.BatchNorm2d(6, affine=affine)
    layer.select('BN', 'BN')
    found = []
    x, upstream = torch.randn(2, *SHAPE)
    for module in (layer.train(training), plain.train(training)):
        leaf = x.clone().requires_grad_()
        y = module(leaf).relu_()
        (first,) = torch.autograd.grad(y, leaf, upstream, create_graph=True)
        first.square().sum().backward()  # second derivatives are those of batch norm too
        named = dict(module.named_parameters())
        vectors = [named[name].grad for name in ('weight',) if affine]
        buffers = (module.running_mean, module.running_var, module.num_batches_tracked)
        found.append((y, first, leaf.grad, *vectors, *buffers))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    layer(x).sum().backward()
    assert all((z.grad == 0).all() for z in (layer.mean_weight, layer.var_weight))


@pytest.mark.parametrize('case', ['correction', 'cumulative', 'one element', 'half parameters'])
def test_what_batch_norm_does_otherwise_stays_with_the_kernels(case, monkeypatch):
    layer = SSN(6, correction=int(case == 'correction'), momentum=None if 'cum' in case else 0.1)
    layer.select('BN', 'BN')
    if case == 'half parameters':
        layer.half()
    x = torch.randn((1, 6, 1, 1) if case == 'one element' else SHAPE)
    again = copy.deepcopy(layer)
    upstream = torch.randn_like(x)
    expected = results(again, x, upstream, 'eager', monkeypatch)
    launched, run = [], direct.run
    monkeypatch.setattr(direct, 'run', lambda *call: launched.append(1) or run(*call))
    found = results(layer, x, upstream, 'triton', monkeypatch)
    assert launched
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_functional_on_the_kernels(monkeypatch):
    x = torch.randn(SHAPE)
    p = torch.tensor([0.2, 0.3, 0.5])
    expected = switchable_norm(x, p, p)
    monkeypatch.setattr(ops, '_BACKEND', 'triton')
    torch.testing.assert_close(switchable_norm(x, p, p), expected)
    exact = switchable_norm(x.double(), p.double(), p.double())  # float64 is not theirs
    torch.testing.assert_close(exact.float(), expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_gradients_have_the_dtypes_of_the_parameters(dtype, monkeypatch):
    monkeypatch.setattr(ops, '_BACKEND', 'triton')
    layer = SSN(6).to(dtype)
    y = layer(torch.randn(SHAPE, dtype=dtype))
    y.backward(torch.randn_like(y))
    assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_kernels_inside_one_compiled_graph(backend, monkeypatch):
    torch.compiler.reset()
    layer = SSN(6, radius=0.3)
    again = copy.deepcopy(layer)
    x, upstream = torch.randn(2, *SHAPE)
    expected = results(layer, x, upstream, 'eager', monkeypatch)
    compiled = torch.compile(again, fullgraph=COMPILES_LAYERS, backend=backend)
    monkeypatch.setattr(ops, '_BACKEND', 'triton')
    x.requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, expected['y'])
    gradients = torch.autograd.grad(y, [x, *again.parameters()], upstream)
    names = ('x', *dict(again.named_parameters()))
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.running_var, expected['buffer running_var'])


def test_a_compiled_layer_uses_its_choice(monkeypatch):
    torch.compiler.reset()
    layer, used, run = SSN(6), [], direct.run
    layer.select('LN', 'IN')
    x = torch.randn(SHAPE)
    expected = layer(x)

    def record(launches, *call):
        constants = [launch.constants for launch in launches]
        used.extend((each['MEAN'], each['VAR']) for each in constants if 'MEAN' in each)
        run(launches, *call)

    monkeypatch.setattr(direct, 'run', record)
    monkeypatch.setattr(ops, '_BACKEND', 'triton')
    compiled = torch.compile(layer, fullgraph=COMPILES_LAYERS, backend='aot_eager')
    torch.testing.assert_close(compiled(x), expected)
    assert set(used) == {(1, 0)}  # never the mixture


def test_missing_triton_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(switchable_norm_triton, '_INSTALLED', False)
    ops._say_that_triton_is_missing.cache_clear()
    with FakeTensorMode(), caplog.at_level(logging.WARNING):
        x = torch.empty(SHAPE, device='cuda')  # has no values, but a device
        for _ in range(2):
            assert ops._fused(x) is None
    (record,) = caplog.records
    assert 'Triton is not installed' in record.message
    assert '\n' not in record.message
    ops._say_that_triton_is_missing.cache_clear()


# What a GPU without a working Triton, a tracer or a capture meets. Fake tensors have a device and
# no values, so this much can be run without the device.


@pytest.fixture
def fake_gpu(monkeypatch):
    """A device that has not been tried yet, and a capability."""
    monkeypatch.setattr(switchable_norm_triton, '_supported_devices', {})
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (8, 0))
    return monkeypatch


@pytest.mark.parametrize(
    'error', [RuntimeError('Failed to find C compiler.\nSet CC.'), FileNotFoundError('Python.h')]
)
def test_a_kernel_that_does_not_compile_is_said_once(error, fake_gpu, caplog):
    def fail():
        raise error

    fake_gpu.setattr(direct, 'kernels', fail)
    fake_gpu.setattr(torch.cuda, 'device', lambda index: contextlib.nullcontext())
    with FakeTensorMode(), caplog.at_level(logging.WARNING):
        assert not switchable_norm_triton._device_is_supported(0)
        assert not switchable_norm_triton._device_is_supported(0)
    (record,) = caplog.records
    assert str(error).splitlines()[0] in record.message
    assert 'cuda:0' in record.message
    assert '\n' not in record.message


def test_an_old_gpu_is_said_once(fake_gpu, caplog):
    fake_gpu.setattr(torch.cuda, 'get_device_capability', lambda index: (6, 1))
    with caplog.at_level(logging.WARNING):
        assert not switchable_norm_triton._device_is_supported(1)
    assert 'compute capability is 6.1' in caplog.text


def test_first_use_inside_a_capture_names_the_remedy(fake_gpu):
    fake_gpu.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    with pytest.raises(RuntimeError, match='forward and backward pass on it before'):
        switchable_norm_triton._device_is_supported(0)


def test_fake_tensors_are_left_to_aten(monkeypatch):
    # Gradients need the device; tests/test_ops/test_gpu.py goes on there.
    monkeypatch.setattr(switchable_norm_triton, '_supported_devices', {0: True})
    monkeypatch.setattr(direct, 'run', None)  # no kernel is launched
    with FakeTensorMode(), torch.device('cuda'), torch.no_grad():
        x = torch.empty(SHAPE)
        assert ops._fused(x) is None
        if torch.version.cuda is None or VERSION < (2, 11):
            return  # no operators for it, or some that ask the device
        for layer in (SSN(6), SSN(6).eval(), SN(6)):
            y = layer(x)
            assert (y.shape, y.device) == (x.shape, x.device)


def test_a_trace_holds_operators_of_aten():
    recorded = []

    def function(x):
        recorded.append(not has_values(x))
        return x + 1

    x = torch.randn(SHAPE)
    torch.jit.trace(function, (x,), check_trace=False)
    assert recorded == [True]
    assert has_values(x)
