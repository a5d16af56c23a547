"""Half precision around the layers: statistics, ratios and their gradients stay float32."""

import copy

import pytest
import torch
from since import AUTOCAST_DTYPES, since
from torch import Tensor, nn

from ssn_plugin import SN, SSN, set_radius

FOUR = ('IN', 'LN', 'BN', 'GN')
SHAPE = (3, 8, 9, 7)
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
# The shares of a mixture, one normalizer by ATen's own operator, and two different ones.
KINDS = ['sparsestmax', 'softmax', 'IN', 'LN', 'BN', 'GN', 'mixed']


def make(kind: str) -> nn.Module:
    """A layer whose parameters are not what they start as."""
    layer = SN(8, normalizers=FOUR, num_groups=2)
    if kind != 'softmax':
        layer = SSN(8, normalizers=FOUR, num_groups=2, radius=0.2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_().mul_(0.3).add_(0.5)
        for control, name in zip(
            (layer.mean_weight, layer.var_weight),
            ('LN', 'BN') if kind == 'mixed' else (kind, kind),
            strict=True,
        ):
            if name in FOUR:
                control[FOUR.index(name)] = 2
    if kind in (*FOUR, 'mixed'):
        set_radius(layer, 1.0)
    return layer


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Y, gradients and running statistics of one training step."""
    x = x.detach().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))
    found = dict(y=y, dx=gradients[0])
    names = [f'd{name}' for name, _ in layer.named_parameters()]
    found |= dict(zip(names, gradients[1:], strict=True))
    return found | dict(running_mean=layer.running_mean, running_var=layer.running_var)


def assert_close(found: dict, expected: dict, dtype: torch.dtype, dy: Tensor) -> None:
    """Y and dx to a rounding of ``dtype``, all else to float32's tolerance."""
    for name, value in expected.items():
        ours = name in ('y', 'dx')
        assert found[name].dtype == (dtype if ours else torch.float32), name
        tolerance = TOLERANCE[dtype] if ours else 1e-5
        # dx and the gradients of ratios are what is left of terms of the size of dy
        floor = 1e-5 * dy.double().norm() if name not in ('y',) else 0
        assert (found[name].double() - value).norm() <= tolerance * value.norm() + floor, name


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_equals_float64_on_the_same_input(kind, dtype, memory_format):
    layer = make(kind)
    x = (torch.randn(SHAPE) * 2 + 3).to(dtype).contiguous(memory_format=memory_format)
    dy = torch.randn(SHAPE).to(dtype)
    expected = results(copy.deepcopy(layer).double(), x.double(), dy.double())
    with torch.autocast('cpu', dtype):
        found = results(layer, x, dy)
    assert_close(found, expected, dtype, dy)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'part of a wider map'])
def test_no_overflow_in_float16(kind, layout):
    """Squares of the activations and sums of the gradients are beyond float16, results are not."""
    layer = make(kind)
    x = (torch.rand(SHAPE) * 2 - 1) * 6e4
    x[0, 0, 0, 0], x[0, 1, 0, 0] = 6e4, -6e4
    x = x.half()
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout != 'contiguous':
        x = torch.cat((x, x), -1)[..., : SHAPE[-1]]
    dy = (torch.randn(SHAPE) * 1000 + 2000).half()  # so that dx is no denormal number
    expected = results(copy.deepcopy(layer).double(), x.double(), dy.double())
    found = results(layer, x, dy)
    assert all(value.isfinite().all() for value in found.values())
    # dx is dy over a standard deviation of 3e4: no term of it is of the size of dy
    assert_close(found, expected, torch.float16, dy / 3e4)


def test_autocast_around_a_network():
    """As autocast leaves it: half precision between layers, float32 parameters and buffers."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SSN(8), nn.ReLU(), nn.Conv2d(8, 8, 3), SSN(8))
    dtypes = []
    for layer in (model[1], model[4]):
        layer.register_forward_hook(lambda _, args, y: dtypes.append((args[0].dtype, y.dtype)))
    x = torch.randn(4, 3, 12, 12)
    exact = copy.deepcopy(model)
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(x).square().mean()
    loss.backward()
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 2
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    exact_loss = exact(x).square().mean()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=2**-6)


@since(2, 3, 'GradScaler of the CPU')
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_training_decides_as_usual(dtype):
    """A short training under autocast, the loss scaled as AmpOptimWrapper does for float16."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SSN(8), nn.ReLU(), nn.Conv2d(8, 1, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scaler = torch.amp.GradScaler('cpu', init_scale=256.0)
    losses = []
    for step in range(20):
        set_radius(model, step / 19)
        x = torch.randn(4, 3, 10, 10)
        optimizer.zero_grad()
        with torch.autocast('cpu', getattr(torch, dtype)):
            loss = (model(x).mean((1, 2, 3)) - x.mean((1, 2, 3))).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert None not in model[1].selected
    assert sum(losses[-5:]) < sum(losses[:5])
    assert model[1].mean_weight.dtype == torch.float32
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_no_overflow_on_a_gpu(kind, dtype):
    layer = make(kind).cuda()
    x = ((torch.rand(SHAPE, device='cuda') * 2 - 1) * 6e4).to(dtype)
    dy = (torch.randn(SHAPE, device='cuda') * 1000).to(dtype)
    expected = results(copy.deepcopy(layer).double(), x.double(), dy.double())
    with torch.autocast('cuda', dtype):
        found = results(layer, x, dy)
    assert_close(found, expected, dtype, dy / 3e4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_amp_optim_wrapper_on_a_gpu(dtype):
    from mmengine.optim import AmpOptimWrapper

    model = nn.Sequential(nn.Conv2d(3, 8, 3), SSN(8), nn.ReLU(), nn.Conv2d(8, 1, 3)).cuda()
    wrapper = AmpOptimWrapper(dtype=dtype, optimizer=torch.optim.SGD(model.parameters(), 0.05))
    for step in range(20):
        set_radius(model, step / 19)
        x = torch.randn(4, 3, 10, 10, device='cuda')
        with wrapper.optim_context(model):
            loss = (model(x).mean((1, 2, 3)) - x.mean((1, 2, 3))).square().mean()
        wrapper.update_params(loss)
    assert None not in model[1].selected
    assert all(value.isfinite().all() for value in model.state_dict().values())
