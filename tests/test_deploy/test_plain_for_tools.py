"""Collapsed layers are layers of torch for the tools that rewrite networks."""

import copy
import pickle
import warnings

import pytest
import torch
from random_state import randomize_affine_and_running
from since import TORCHSCRIPT
from torch import nn

from ssn_plugin import SN, SSN, SSN1d, SSN2d, SSN3d, collapse_ssn

CHOICES = [('IN', 'IN'), ('LN', 'LN'), ('BN', 'BN'), ('GN', 'GN'), ('LN', 'BN')]


def network(mean, var, layer=SSN, conv=nn.Conv2d, **kwargs):
    norm = layer(8, normalizers=('IN', 'LN', 'BN', 'GN'), num_groups=2, **kwargs)
    randomize_affine_and_running(norm)
    norm.select(mean, var)
    return nn.Sequential(conv(3, 8, 3), norm, nn.ReLU()).eval()


@pytest.mark.parametrize('choice', CHOICES)
@pytest.mark.parametrize('layer', [SSN, SSN2d])
@pytest.mark.parametrize('ran', [False, True])
def test_symbolic_tracing_takes_them_for_leaves(choice, layer, ran):
    inputs = torch.randn(2, 3, 12, 9), torch.randn(1, 3, 3, 3)  # whose map is 1 x 1
    model = collapse_ssn(network(*choice, layer))
    if ran:
        model(inputs[0])
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes][1:-1] == ['call_module'] * 3
    for x in inputs:
        assert torch.equal(graph(x), model(x))


def test_undecided_layers_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SSN(8), SN(8)).eval()
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize(
    ('layer', 'shape', 'kind'),
    [
        (SSN1d, (4, 8), nn.BatchNorm1d),
        (SSN2d, (4, 8, 5, 5), nn.BatchNorm2d),
        (SSN3d, (4, 8, 3, 3, 3), nn.BatchNorm3d),
        (SSN, (4, 8), nn.BatchNorm1d),
        (SSN, (4, 8, 5), nn.BatchNorm1d),
        (SSN, (4, 8, 5, 5), nn.BatchNorm2d),
        (SSN, (4, 8, 3, 3, 3), nn.BatchNorm3d),
    ],
)
def test_batch_norm_is_that_of_torch_from_the_first_input_on(layer, shape, kind):
    norm = layer(8)
    randomize_affine_and_running(norm)
    norm.select('BN', 'BN')
    made = collapse_ssn(norm.eval())
    if layer is not SSN:
        assert type(made) is kind  # already
    x = torch.randn(shape)
    again = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    for collapsed in (made, again):
        held = dict(collapsed.named_parameters())
        torch.testing.assert_close(collapsed(x), norm(x), rtol=0, atol=0)
        assert type(collapsed) is kind
        assert all(parameter is held[name] for name, parameter in collapsed.named_parameters())


@pytest.mark.parametrize('eps', [0, 1e-3])
@pytest.mark.parametrize('choice', CHOICES)
def test_eps_is_kept(choice, eps):
    model = network(*choice, eps=eps)
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    collapsed = collapse_ssn(model)
    assert collapsed[1].eps == eps
    torch.testing.assert_close(collapsed(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('layer', [SSN, SSN2d])
def test_mmengine_computes_convolution_and_batch_norm_as_one(layer):
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval

    model = nn.Module()
    model.backbone = collapse_ssn(network('BN', 'BN', layer))
    x = torch.randn(2, 3, 9, 9)
    expected = model.backbone(x)
    called = []
    model.backbone[1].register_forward_hook(lambda *_: called.append(1))
    turn_on_efficient_conv_bn_eval(model, 'backbone')
    torch.testing.assert_close(model.backbone(x), expected, rtol=1e-5, atol=1e-5)
    assert called == []  # its statistics are in the convolution


@pytest.mark.parametrize('layer', [SSN, SSN2d])
def test_torch_fuses_them(layer):
    from torch.ao.quantization import fuse_modules

    model = collapse_ssn(network('BN', 'BN', layer))
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of its own deprecation
        fused = fuse_modules(model, ['0', '1', '2'])
    assert type(fused[1]) is nn.Identity
    torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('choice', [('LN', 'LN'), ('GN', 'GN'), ('IN', 'IN'), ('LN', 'BN')])
def test_exact_in_onnx_by_the_torchscript_exporter(choice, tmp_path):
    """Over millions of elements, for every size; torch's own group norm is off by 3e-3."""
    pytest.importorskip('onnx')
    runtime = pytest.importorskip('onnxruntime')
    norm = SSN(64, normalizers=('IN', 'LN', 'BN', 'GN'))
    norm.select(*choice)
    model = collapse_ssn(norm.eval())
    path = str(tmp_path / 'norm.onnx')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            model, (torch.randn(1, 64, 20, 24),), path, opset_version=17, **TORCHSCRIPT,
            input_names=['x'], output_names=['y'],
            dynamic_axes={'x': {0: 'n', 2: 'h', 3: 'w'}},
        )  # fmt: skip
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for shape in ((1, 64, 400, 608), (2, 64, 5, 3)):
        x = 3 + torch.randn(shape)
        (found,) = session.run(None, {'x': x.numpy()})
        expected = model.double()(x.double())
        model.float()
        assert (torch.from_numpy(found) - expected).abs().max() < 5e-5
