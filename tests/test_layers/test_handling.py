"""What people do to layers: compile, copy, pickle, save, move, cast, call with other tensors."""

import copy
import io
import pickle

import pytest
import torch
from since import ONE_GRAPH
from torch import nn
from torch.func import functional_call, grad, vmap

from ssn_plugin import SN, SSN, set_radius

CHANNELS = 6
# Mixed, on the circle, frozen on three different candidates.
STATES = {'mixture': 0.0, 'circle': 0.4, 'frozen': 1.0}


def layer_in(state: str, kind=SSN, **settings) -> nn.Module:
    torch.manual_seed(1)
    layer = kind(CHANNELS, **settings)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.02, 0.1, -0.05]))
        layer.var_weight.copy_(torch.tensor([0.1, 0.03, -0.04]))
        layer.weight.normal_()
        layer.bias.normal_()
    if kind is SSN:
        set_radius(layer, STATES[state])
    layer(torch.randn(4, CHANNELS, 5, 5) + 1)  # running statistics of something
    return layer


def step(layer, x, upstream) -> list[torch.Tensor]:
    """Output and all gradients."""
    x = x.detach().clone().requires_grad_()
    inner = layer._orig_mod if hasattr(layer, '_orig_mod') else layer
    inner.zero_grad()
    y = layer(x)
    y.backward(upstream)
    return [y.detach(), x.grad, *(p.grad.clone() for p in inner.parameters())]


def check_same(ours: nn.Module, theirs: nn.Module, statistics: bool = True, **tolerance) -> None:
    """In training, then in evaluation, running statistics included unless told otherwise."""
    generator = torch.Generator().manual_seed(2)
    dtype, device = theirs.weight.dtype, theirs.weight.device
    for training in (True, False):
        x, upstream = (
            torch.randn(2, 3, CHANNELS, 6, 5, generator=generator).to(device, dtype).unbind()
        )
        found, expected = (step(layer.train(training), x, upstream) for layer in (ours, theirs))
        for name, (a, b) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, n=name: f'{n}: {m}')
        inner = ours._orig_mod if hasattr(ours, '_orig_mod') else ours
        for (name, a), b in zip(inner.named_buffers(), theirs.buffers(), strict=True):
            if 'running' in name and not statistics:
                continue
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, n=name: f'{n}: {m}')


EXACT = dict(rtol=0, atol=0)
CLOSE = dict(rtol=2e-5, atol=2e-5)  # kernels that are fused round elsewhere


@ONE_GRAPH
@pytest.mark.slow
@pytest.mark.parametrize('state', STATES)
@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
def test_compiled_to_one_graph_forward_and_backward(backend, state):
    torch._dynamo.reset()
    layer = layer_in(state)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=backend)
    # A graph does not know what is frozen, and goes on tracking what nobody will read.
    check_same(compiled, layer, statistics=state != 'frozen', **CLOSE)


@ONE_GRAPH
@pytest.mark.slow
@pytest.mark.parametrize('momentum', [0.1, None])
def test_compiled_training_freezes_as_any_other(momentum):
    """A radius that changes is no new graph, and a frozen layer trains on."""
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), SSN(CHANNELS, momentum=momentum), nn.ReLU())
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend='aot_eager')
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, other)]
    for radius in (0.0, 0.2, 0.5, 1.0, 1.0):
        x, upstream = torch.randn(3, 3, 8, 8), torch.randn(3, CHANNELS, 6, 6)
        for model, run, optimizer in zip(
            (plain, other), (plain, compiled), optimizers, strict=True
        ):
            set_radius(model, radius)
            optimizer.zero_grad()
            run(x).backward(upstream)
            optimizer.step()
    assert None not in plain[1].selected
    for (name, ours), theirs in zip(
        other.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        if 'running' not in name:  # those of a frozen layer: see above
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved_whole(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def saved_weights(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = type(layer)(CHANNELS)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize('kind', [SSN, SN])
@pytest.mark.parametrize('state', STATES)
@pytest.mark.parametrize('how', [copy.deepcopy, copy.copy, pickled, saved_whole, saved_weights])
def test_copies(how, state, kind):
    layer = layer_in(state, kind)
    expected = layer_in(state, kind)
    check_same(how(layer), expected, **EXACT)


@pytest.mark.parametrize('how', [copy.deepcopy, pickled, saved_whole, saved_weights])
def test_copies_are_frozen_on_their_own(how):
    layer = layer_in('circle')
    twin = how(layer)
    set_radius(twin, 1.0)
    assert twin.selected == ('LN', 'IN')
    assert layer.selected == (None, None)
    assert layer.mean_fixed == 0
    frozen = how(twin)
    optimizer = torch.optim.SGD(frozen.parameters(), lr=1.0, weight_decay=0.5)
    frozen(torch.randn(2, CHANNELS, 4, 4)).sum().backward()
    optimizer.step()
    assert frozen.mean_ratios.tolist() == [0, 1, 0]
    assert frozen.var_ratios.tolist() == [1, 0, 0]


@pytest.mark.parametrize('state', STATES)
@pytest.mark.parametrize(
    ('cast', 'dtype', 'error'),
    [
        (lambda m: m.half(), torch.float16, 2.0**-9),
        (lambda m: m.bfloat16(), torch.bfloat16, 2.0**-6),
        (lambda m: m.double(), torch.float64, 1e-5),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16, 2.0**-6),
        (lambda m: m.to('cpu', torch.float16), torch.float16, 2.0**-9),
    ],
    ids=['half', 'bfloat16', 'double', 'to', 'to_device'],
)
def test_casts(cast, dtype, error, state):
    """Half precision rounds weight and statistics too, so twice the usual tolerance."""
    layer, other = layer_in(state).eval(), cast(layer_in(state)).eval()
    assert all(p.dtype == dtype for p in other.parameters())
    assert other.num_batches_tracked.dtype == other.mean_fixed.dtype == torch.int64
    assert other.selected == layer.selected
    for training in (True, False):
        x = torch.randn(3, CHANNELS, 6, 5)
        y = other.train(training)(x.to(dtype))
        assert y.dtype == dtype
        expected = layer.train(training)(x)
        scale = expected.abs().max().item()
        # The ratios on the circle come from control parameters that are rounded as well.
        assert (y.float() - expected).abs().max().item() <= 4 * error * scale
    if state == 'frozen':
        assert other.mean_ratios.tolist() == layer.mean_ratios.tolist()


def test_to_meta_and_back():
    layer = layer_in('frozen')
    there = copy.deepcopy(layer).to('meta')
    assert there(torch.randn(2, CHANNELS, 4, 4, device='meta')).shape == (2, CHANNELS, 4, 4)
    back = there.to_empty(device='cpu')
    back.load_state_dict(layer.state_dict())
    check_same(back, layer, **EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('state', STATES)
def test_to_a_gpu_and_back(state):
    layer = layer_in(state)
    there = copy.deepcopy(layer).cuda()
    assert there.selected == layer.selected
    check_same(there.cpu(), layer, **EXACT)


@pytest.mark.parametrize('state', STATES)
def test_functional_call(state):
    layer, other = layer_in(state), layer_in(state)
    x = torch.randn(3, CHANNELS, 6, 5)
    tensors = {
        **{name: p.detach().clone() for name, p in layer.named_parameters()},
        **{name: b.clone() for name, b in layer.named_buffers()},
    }
    tensors['weight'] += 1
    with torch.no_grad():
        other.weight += 1
    y = functional_call(layer, tensors, (x,))
    assert torch.equal(y, other(x))
    # Statistics of the call go where its tensors are. (What is frozen on others has none.)
    assert torch.equal(tensors['running_mean'], other.running_mean)
    assert torch.equal(layer.running_mean, other.running_mean) == (state == 'frozen')


TRANSFORMS = {
    'vmap': lambda layer, x: vmap(layer)(x),
    'grad': lambda layer, x: grad(lambda v: layer(v).square().sum())(x[0]),
}


@pytest.mark.parametrize('state', STATES)
@pytest.mark.parametrize('transform', TRANSFORMS)
def test_transforms_of_torch_func_are_refused_in_one_line(transform, state):
    """Statistics over a batch that the layer does not see would be wrong silently."""
    x = torch.randn(2, 3, CHANNELS, 4, 4)
    for training in (True, False):
        layer = layer_in(state).train(training)
        before = [buffer.clone() for buffer in layer.buffers()]
        with pytest.raises(RuntimeError, match=r'torch\.func') as caught:
            TRANSFORMS[transform](layer, x)
        assert '\n' not in str(caught.value)
        assert 'SSN' in str(caught.value)
        for buffer, value in zip(layer.buffers(), before, strict=True):
            assert torch.equal(buffer, value)
