"""ONNX files of networks with every kind of layer give what torch gives, at sizes of any kind."""

import re

import pytest
import torch
from since import EXPORT
from torch import nn
from torch.nn import functional as F

from ssn_plugin import SN, SSN, SyncSSN, collapse_ssn, hold_ratios, set_radius
from ssn_plugin.deploy import onnx_file
from ssn_plugin.deploy.onnx_file import (
    MIN_OPSET,
    ExportError,
    check_opset,
    relative_difference,
    run_onnx,
    write_onnx,
)

pytest.importorskip('onnx')
pytestmark = EXPORT
NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
SHAPES = [(2, 3, 20, 24), (1, 3, 9, 13), (3, 3, 1, 1), (4, 3, 31, 1)]


def _pairs(initials: str) -> list[tuple[str, str]]:
    names = {name[0]: name for name in NORMALIZERS}
    return [(names[mean], names[var]) for mean, var in initials.split()]


def ssn(pair: tuple[str, str], correction: int) -> SSN:
    """A layer that chose those normalizers."""
    layer = SSN(6, normalizers=NORMALIZERS, num_groups=3, correction=correction)
    with torch.no_grad():
        for control, name in zip((layer.mean_weight, layer.var_weight), pair, strict=True):
            control[NORMALIZERS.index(name)] = 2
    set_radius(layer, 0.3)
    assert layer.selected == pair
    return layer


def mixture(kind: type, **settings) -> nn.Module:
    """A layer that has not decided."""
    layer = kind(6, normalizers=NORMALIZERS, num_groups=3, **settings)
    with torch.no_grad():
        layer.mean_weight.normal_(std=0.2)
        layer.var_weight.normal_(std=0.2)
    assert None in layer.selected
    return layer


LAYERS = {
    'decided': lambda: [
        *(ssn(pair, 0) for pair in _pairs('BB II LL GG LB IG')),
        *(ssn(pair, 1) for pair in _pairs('BB II BL')),
    ],
    'undecided': lambda: [
        mixture(SSN),
        mixture(SN),
        mixture(SyncSSN),
        mixture(SSN, correction=1, track_running_stats=False, affine=False),
        nn.GroupNorm(2, 6),
    ],
}


class Network(nn.Module):
    """Every layer on the same convolution, so that each has an output of its own."""

    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(norms)
        with torch.no_grad():
            for norm in norms:
                if norm.weight is not None:
                    norm.weight.normal_()
                    norm.bias.normal_()
                if getattr(norm, 'running_mean', None) is not None:
                    norm.running_mean.normal_()
                    norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x)
        return tuple(norm(y) for norm in self.norms)


@pytest.mark.parametrize('kind', LAYERS)
def test_every_layer_at_every_size(kind, tmp_path):
    network = Network(LAYERS[kind]()).eval()
    inputs = [torch.randn(shape) + 1 for shape in SHAPES]
    with torch.no_grad():
        expected = [network(x) for x in inputs]
    hold_ratios(collapse_ssn(network, keep_undecided=True))
    path = tmp_path / 'a.onnx'
    write_onnx(network, [f'y{k}' for k in range(len(network.norms))], path, notes={'a': 'b'})
    assert [file.name for file in tmp_path.iterdir()] == ['a.onnx']
    for found, wanted in zip(run_onnx(path, inputs), expected, strict=True):
        for layer, ours, theirs in zip(network.norms, found, wanted, strict=True):
            difference = float((ours - theirs).abs().max())
            assert difference <= 1e-5 * float(theirs.abs().max()), (layer, theirs.shape)


def test_openvino_reads_the_file(tmp_path):
    openvino = pytest.importorskip('openvino')
    network = Network([layer for kind in LAYERS for layer in LAYERS[kind]()]).eval()
    inputs = [torch.randn(shape) + 1 for shape in SHAPES]
    with torch.no_grad():
        expected = [network(x) for x in inputs]
    hold_ratios(collapse_ssn(network, keep_undecided=True))
    path = tmp_path / 'a.onnx'
    write_onnx(network, [f'y{k}' for k in range(len(network.norms))], path)
    # Without the hint it takes bfloat16 where the CPU has it.
    exact = {'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.Core().compile_model(str(path), 'CPU', exact)
    for x, wanted in zip(inputs, expected, strict=True):
        found = [torch.from_numpy(y) for y in compiled(x.numpy()).values()]
        assert relative_difference(found, wanted) < 1e-5


def test_the_file(tmp_path):
    import onnx

    path = tmp_path / 'a.onnx'
    network = Network([nn.BatchNorm2d(6), nn.BatchNorm2d(6)]).eval()
    write_onnx(network, ['a', 'b'], path, opset=18, notes={'key': 'value'})
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 18
    assert {p.key: p.value for p in model.metadata_props}['key'] == 'value'
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ['batch', 3, 'height', 'width']
    assert [node.name for node in model.graph.output] == ['a', 'b']


def test_long_rows_are_as_exact_as_torch(tmp_path):
    # ONNX Runtime's InstanceNormalization is off by 1e-3 here.
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.GroupNorm(1, 64)).eval()
    x = torch.randn(1, 3, 200, 320) + 1
    path = tmp_path / 'a.onnx'
    write_onnx(network, ['y'], path)
    with torch.no_grad():
        exact = network.double()(x.double())
    assert relative_difference(run_onnx(path, [x])[0], [exact.float()]) < 1e-5


class OfOneSize(nn.Module):
    def forward(self, x):
        return x * int(x.shape[2])


class Chooses(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ('network', 'said'), [(OfOneSize(), 'Constraints violated'), (Chooses(), 'data-dependent')]
)
def test_what_cannot_be_recorded(network, said, tmp_path):
    with pytest.raises(ExportError, match=f'^cannot be recorded: .*{said}') as caught:
        write_onnx(network, ['y'], tmp_path / 'a.onnx')
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())


def named(module: nn.Module) -> nn.Module:
    """A network in which that is called features.body."""
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 1), module))
    network.features = network._modules.pop('0')
    network.features.body = network.features._modules.pop('1')
    return network.eval()


class OfOneBatch(nn.Module):
    def forward(self, x):
        return x * int(x.shape[0])


@pytest.mark.parametrize(
    ('module', 'remedy', 'other'),
    [
        (nn.AdaptiveAvgPool2d(3), '--size HEIGHT WIDTH', '--batch'),
        (nn.AdaptiveMaxPool2d((1, 2)), '--size HEIGHT WIDTH', '--batch'),
        (OfOneSize(), '--size HEIGHT WIDTH', '--batch'),
        (OfOneBatch(), '--batch N', '--size'),
    ],
)
def test_what_holds_for_some_sizes_is_named_with_the_remedy(module, remedy, other, tmp_path):
    network, path = named(module), tmp_path / 'a.onnx'
    with pytest.raises(ExportError) as caught:
        write_onnx(network, ['y'], path)
    assert re.search(r' (in )?body\b', str(caught.value))
    assert str(caught.value).endswith(f'; make it for one size by {remedy}')
    assert other not in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert not path.exists()


@pytest.mark.parametrize(
    ('module', 'fixed', 'shapes'),
    [
        (nn.AdaptiveAvgPool2d(3), {2: 10, 3: 14}, [(1, 3, 10, 14), (3, 3, 10, 14)]),
        (OfOneSize(), {2: 10}, [(3, 3, 10, 14), (1, 3, 10, 9)]),
        (OfOneBatch(), {0: 3}, [(3, 3, 10, 14), (3, 3, 9, 5)]),
    ],
)
def test_files_for_one_size(module, fixed, shapes, tmp_path):
    network, path = named(module), tmp_path / 'a.onnx'
    write_onnx(network, ['y'], path, fixed=fixed)
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            assert relative_difference(run_onnx(path, [x])[0], [network(x)]) < 1e-5


def test_what_onnx_runtime_cannot_run_is_named(tmp_path):
    """A node that fails leads back to the module that it is of."""

    class Fourth(nn.Module):
        def forward(self, x):
            return x[:, :, 40]

    path = tmp_path / 'a.onnx'
    write_onnx(named(Fourth()), ['y'], path)
    with pytest.raises(ExportError, match=r'cannot run it in body: .*; if .* --size') as caught:
        run_onnx(path, [torch.randn(1, 3, 20, 20)])
    assert '\n' not in str(caught.value)


class ByImage(nn.Module):
    """A convolution with a kernel of each image's own, as DMNet has, which pools to a grid."""

    def forward(self, x):
        kernels = F.adaptive_avg_pool2d(x, 3).view(-1, 1, 3, 3)
        y = F.conv2d(x.view(1, -1, *x.shape[2:]), kernels, groups=x.shape[0] * x.shape[1])
        return y.view(x.shape[0], x.shape[1], *y.shape[2:])


def test_remedies_lead_to_a_file_one_after_the_other(tmp_path):
    network, path, fixed = named(ByImage()), tmp_path / 'a.onnx', {}
    for remedy, sizes in (('--size HEIGHT WIDTH', {2: 10, 3: 14}), ('--batch N', {0: 2})):
        with pytest.raises(ExportError, match=f' by {remedy}$'):
            write_onnx(network, ['y'], path, fixed=fixed)
        fixed |= sizes
    write_onnx(network, ['y'], path, fixed=fixed)
    x = torch.randn(2, 3, 10, 14)
    with torch.no_grad():
        assert relative_difference(run_onnx(path, [x])[0], [network(x)]) < 1e-5


@pytest.mark.parametrize('opset', [7, MIN_OPSET - 1, 999])
def test_opset(opset):
    with pytest.raises(ExportError, match=rf'^opset: got {opset}, expected 18 to \d+$'):
        check_opset(opset)


def test_a_torch_without_the_exporter(monkeypatch):
    monkeypatch.setattr(onnx_file, 'EXPORTS_EVERY_SIZE', False)
    with pytest.raises(ExportError, match=r'^torch: got 2\..*, expected 2\.6 or newer'):
        check_opset(20)


def test_relative_difference():
    y = torch.tensor([1.0, -4.0])
    assert relative_difference([y + 1], [y]) == 0.25
    assert relative_difference([y, y], [y, y * 2]) == 0.5
    assert relative_difference([y.view(1, 2)], [y]) == float('inf')
    assert relative_difference([y * float('nan')], [y]) == float('inf')


def test_hold_ratios_refuses_training():
    model = nn.Sequential(SSN(4), nn.Sequential(SN(4)).eval(), SSN(4).eval())
    before = list(model.modules())
    with pytest.raises(ValueError, match=r'^model: got training mode, expected model.eval\(\): 0$'):
        hold_ratios(model)
    assert list(model.modules()) == before
    with pytest.raises(ValueError, match='the model itself'):
        hold_ratios(SSN(4))
