"""The layers on a GPU: compiled kernels against float64, torch.compile, CUDA graphs, fallback."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssn_plugin import SN, SSN, switchable_norm
from ssn_plugin.ops.switchable_norm.triton import direct
from ssn_plugin.ops.switchable_norm.triton import launch as backend
from ssn_plugin.torch_versions import COMPILES_LAYERS

if not (torch.cuda.is_available() and backend.is_available()):
    pytest.skip('no GPU, or no Triton', allow_module_level=True)

FOUR = ('IN', 'LN', 'BN', 'GN')
# Relative, of a whole tensor. What is written in half precision is rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
FORMATS = [torch.contiguous_format, torch.channels_last]
# Each with what it is there for.
SHAPES = {
    'stem of two images': (2, 64, 400, 672),
    'FPN level': (2, 256, 50, 84),
    'last stage of a classifier': (32, 512, 7, 7),
    'regions': (300, 32, 7, 7),
    'pooled': (4, 256, 1, 1),
    'odd': (3, 36, 33, 31),
}


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels in the order of their launches."""
    names, run = [], direct.run

    def record(launches, *call):
        names.extend(launch.name for launch in launches)
        run(launches, *call)

    monkeypatch.setattr(direct, 'run', record)
    return names


def make(kind: str, channels: int) -> torch.nn.Module:
    """A layer whose parameters and buffers are not what they start as."""
    layer = SN(channels, normalizers=FOUR, num_groups=4)
    if kind != 'softmax':
        layer = SSN(channels, normalizers=FOUR, num_groups=4, radius=0.2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4 + (parameter.dim() and 0.5))
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    if kind == 'decided':
        layer.select('LN', 'BN')
    return layer.cuda()


def image(shape, dtype=torch.float32, memory_format=torch.contiguous_format) -> torch.Tensor:
    """Channels of different means."""
    x = torch.randn(shape, device='cuda') + torch.randn(1, shape[1], 1, 1, device='cuda')
    return x.to(dtype).contiguous(memory_format=memory_format)


def results(layer, x, dy) -> dict[str, torch.Tensor]:
    """Y, gradients and buffers after one call."""
    x = x.detach().requires_grad_()
    y = layer(x)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dy.to(y.dtype))
    found = dict(zip(('y', 'dx', *parameters), (y, *gradients), strict=True))
    return found | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_close(found, expected, dtype, dy):
    for name, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(found[name], value), name
            continue
        tolerance = TOLERANCE[dtype if name in ('y', 'dx') else torch.float32]
        floor = 1e-6
        if name in ('dx', 'mean_weight', 'var_weight'):
            floor = 1e-5 * dy.double().norm()  # may be differences of terms in units of dy
        error = (found[name].double() - value.double()).norm()
        assert error <= tolerance * value.norm() + floor, f'{name}: {error}'


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind', ['sparsestmax', 'softmax', 'decided'])
@pytest.mark.parametrize('memory_format', FORMATS, ids=str)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_layers_equal_float64(shape, dtype, memory_format, kind, training, launches):
    layer = make(kind, shape[1]).train(training)
    exact = copy.deepcopy(layer).double()
    x, dy = (image(shape, dtype, memory_format) for _ in range(2))
    expected = results(exact, x.double(), dy.double())
    assert not launches  # float64 is not theirs
    found = results(layer, x, dy)
    assert 'ssn_fwd_apply_kernel' in launches
    assert 'ssn_bwd_dx_kernel' in launches
    assert_close(found, expected, dtype, dy)
    for name in ('y', 'dx'):
        assert found[name].dtype == dtype
        assert found[name].stride() == x.stride()


@pytest.mark.parametrize('memory_format', FORMATS, ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', [(2, 16, 128, 127), (300, 32, 7, 7), (3, 36, 20, 25)])
def test_a_layer_decided_on_instance_norm(shape, dtype, memory_format, launches):
    layer = make('sparsestmax', shape[1])
    layer.select('IN', 'IN')
    exact = copy.deepcopy(layer).double()
    x, dy = (image(shape, dtype, memory_format) for _ in range(2))
    found = results(layer, x, dy)
    whole = ['ssn_fwd_apply_kernel', 'ssn_bwd_dx_kernel', 'ssn_bwd_pool_kernel']
    if x.is_contiguous() or shape[2] < 100:  # a program keeps whole rows
        assert launches == whole
    assert_close(found, results(exact, x.double(), dy.double()), dtype, dy)


def test_same_input_same_bits():
    x, dy = image((4, 64, 57, 61)), image((4, 64, 57, 61))
    layer = make('sparsestmax', 64)
    again = copy.deepcopy(layer)
    torch.testing.assert_close(results(layer, x, dy), results(again, x, dy), rtol=0, atol=0)


@pytest.mark.parametrize('kind', ['sparsestmax', 'decided'])
def test_no_synchronisation(kind):
    layer, x, dy = make(kind, 64), image((2, 64, 40, 40)), image((2, 64, 40, 40))
    results(layer, x, dy)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        results(layer, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind', ['sparsestmax', 'decided'])
@pytest.mark.parametrize('memory_format', FORMATS, ids=str)
def test_compile_is_one_graph(memory_format, kind, training, launches):
    x, dy = (image((2, 64, 33, 40), memory_format=memory_format) for _ in range(2))
    layer = make(kind, 64).train(training)
    again = copy.deepcopy(layer)
    expected = results(layer, x, dy)
    launches.clear()
    torch.compiler.reset()
    compiled = torch.compile(again, fullgraph=COMPILES_LAYERS)
    x = x.detach().requires_grad_()
    y = compiled(x)
    gradients = torch.autograd.grad(y, [x, *again.parameters()], dy)
    names = ('y', 'dx', *dict(again.named_parameters()))
    found = dict(zip(names, (y, *gradients), strict=True)) | dict(again.named_buffers())
    assert 'ssn_fwd_apply_kernel' in launches
    assert_close(found, expected, torch.float32, dy)


@pytest.mark.parametrize('kind', ['sparsestmax', 'decided'])
def test_cuda_graph(kind):
    shape = (2, 64, 33, 40)
    layer = make(kind, 64)
    x, dy = image(shape).requires_grad_(), image(shape)

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    again = copy.deepcopy(layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        new_x, new_dy = image(shape), image(shape)
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
        graph.replay()
        expected = results(again, new_x, new_dy)
        names = ('y', 'dx', *dict(layer.named_parameters()))
        found = dict(zip(names, captured, strict=True)) | dict(layer.named_buffers())
        assert_close(found, expected, torch.float32, dy)


def test_autocast():
    layer, x, dy = make('sparsestmax', 64), image((2, 64, 20, 20)), image((2, 64, 20, 20))
    expected = results(copy.deepcopy(layer), x, dy)
    with torch.autocast('cuda', torch.float16):
        found = results(layer, x, dy)
    assert_close(found, expected, torch.float32, dy)


def test_fallback_is_eager_with_the_same_result(monkeypatch, launches):
    layer, x, dy = make('sparsestmax', 64), image((2, 64, 20, 20)), image((2, 64, 20, 20))
    again = copy.deepcopy(layer)
    expected = results(layer, x, dy)
    launches.clear()
    monkeypatch.setattr(backend, 'supports', lambda x: False)
    found = results(again, x, dy)
    assert not launches
    assert_close(found, expected, torch.float32, dy)


def test_more_than_32_bits_of_elements():
    shape = (3, 8, 9500, 9500)  # 2.2e9 elements
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip('needs 16 GB of GPU memory')
    x = torch.zeros(shape, dtype=torch.bfloat16, device='cuda')
    x[-1, -1].normal_().add_(3)
    one = torch.tensor([1.0, 0, 0], device='cuda')
    y = switchable_norm(x, one, one)
    row = x[-1, -1].double()
    expected = (row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt()
    assert (y[-1, -1].double() - expected).norm() < 2**-7 * expected.norm()
    assert (y[:-1] == 0).all()


# What records operators is given ATen's


def test_fake_tensors():
    with FakeTensorMode(), torch.device('cuda'):
        layer, x = SSN(8), torch.empty(2, 8, 5, 5, requires_grad=True)
        y = layer(x)
        y.backward(torch.empty_like(y))
        assert x.grad.shape == y.shape == x.shape


@pytest.mark.parametrize('kind', ['sparsestmax', 'decided'])
def test_trace(kind, launches):
    layer, x = make(kind, 64).eval(), image((2, 64, 9, 8))
    expected = layer(x)
    launches.clear()
    traced = torch.jit.trace(layer, (x,))
    assert not launches
    torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)


def test_first_use_inside_a_capture_names_the_remedy(monkeypatch):
    monkeypatch.setattr(backend, '_supported_devices', {})
    layer, x = make('sparsestmax', 64), image((2, 64, 9, 8))
    with (
        pytest.raises(RuntimeError, match='forward and backward pass on it before'),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer(x)


def test_x_without_gradient():
    layer, x = make('sparsestmax', 64), image((2, 64, 9, 8))
    exact = copy.deepcopy(layer).double()
    dy = image(x.shape)
    layer(x).backward(dy)
    exact(x.double()).backward(dy.double())
    for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)


def test_a_layer_on_the_cpu_is_refused():
    # Twice: behind a layer of the same kind its kernels are compiled and launched directly.
    x = torch.randn(2, 8, 6, 5, device='cuda')
    for _ in range(2):
        SSN(8).cuda()(x)
        with pytest.raises(RuntimeError, match='on cpu, expected cuda:0'):
            SSN(8)(x)
