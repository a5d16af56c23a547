"""The Triton kernels against the formulas in float64: interpreted on the CPU, compiled on a GPU."""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from since import require_kernels
from torch import library

from ssn_plugin.ops import reference
from ssn_plugin.ops.sparsestmax import SparsestMaxFunction, circumradius
from ssn_plugin.ops.switchable_norm.statistics import NORMALIZERS
from ssn_plugin.ops.switchable_norm.triton import direct
from ssn_plugin.ops.switchable_norm.triton import launch as backend

triton = pytest.importorskip('triton')
tl = pytest.importorskip('triton.language')
TRITON = require_kernels()

from ssn_plugin.ops.switchable_norm.triton import custom_ops as switchable_norm_custom_ops  # noqa: E402, F401  (registers them)
from ssn_plugin.ops.switchable_norm.triton import kernels  # noqa: E402
from ssn_plugin.ops.switchable_norm.triton.kernels import tiles  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings('ignore:.*encountered in:RuntimeWarning'),  # of NumPy
    pytest.mark.filterwarnings('error:Conversion of an array:DeprecationWarning'),  # until 2.4
]

# tests/conftest.py chooses the interpreter where there is no GPU.
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
THREE = ('IN', 'LN', 'BN')
ORDERS = [order for count in (2, 3, 4) for order in itertools.permutations(NORMALIZERS, count)]
GROUPS = 2
EPS = 1e-5
CONTROL_GRADIENTS = ('dmean_control', 'dvar_control')
NAMES = ('y', 'dx', *CONTROL_GRADIENTS, 'dweight', 'dbias')
# Relative, of a whole tensor. What is written in half precision is rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
PROBE = 'ssn_probe_kernel'
GUARD, CANARY = 67, 12345.0  # odd: what lies behind it is not aligned


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """What the backend allocates is full of NaN and lies between numbers that must survive."""
    buffers = []

    def guard(size: int, dtype, device) -> torch.Tensor:
        buffer = torch.full((size + 2 * GUARD,), CANARY, dtype=dtype, device=device)
        buffers.append(buffer)
        inner = buffer[GUARD : GUARD + size]
        return inner.fill_(torch.nan)

    def vector(size, like):
        return guard(size, torch.float32, like.device)

    def image(x):
        return guard(x.numel(), x.dtype, x.device).as_strided(x.shape, x.stride())

    monkeypatch.setattr(backend, '_vector', vector)
    monkeypatch.setattr(backend, '_image', image)
    yield
    for buffer in buffers:
        expected = torch.tensor(CANARY).to(buffer.dtype).item()
        assert (buffer[:GUARD] == expected).all()
        assert (buffer[-GUARD:] == expected).all()


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    """Prepare a function for the interpreter once, not at each of its calls: half of the time."""
    function = type(tiles.row_block)
    if function.__name__ != 'InterpretedFunction':
        return
    interpreter = sys.modules[function.__module__]
    look_up, found = interpreter._get_np_dtype, {}

    def look_up_once(kind):
        # It looks up types by the thousand, each time in a table that it makes anew.
        if kind.name not in found:
            found[kind.name] = look_up(kind)
        return found[kind.name]

    monkeypatch.setattr(interpreter, '_get_np_dtype', look_up_once)
    call, prepared = function.__call__, set()

    def call_prepared(self, *args, **kwargs):
        if self in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(function, '__call__', call_prepared)


@pytest.fixture
def limits(monkeypatch):
    """Set limits of the backend, that small tensors go the ways of large ones."""

    def set_limits(**values):
        for name, value in values.items():
            monkeypatch.setattr(backend, f'_{name}', value)
        clear()

    def clear():
        for cached in (backend._plan, backend._forward_pass, backend._backward_pass):
            cached.cache_clear()

    yield set_limits
    clear()


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels in the order of their launches."""
    names, run = [], direct.run

    def record(launches, *call):
        names.extend(launch.name for launch in launches)
        run(launches, *call)

    monkeypatch.setattr(direct, 'run', record)
    return names


def in_nan(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the middle of NaN, with its strides: whoever reads beside it will show it."""
    buffer = torch.full((x.numel() + 2 * GUARD,), torch.nan, dtype=x.dtype, device=DEVICE)
    return buffer[GUARD : GUARD + x.numel()].as_strided(x.shape, x.stride()).copy_(x)


def image(*shape, dtype=torch.float32, last=False, mean=1.0, std=2.0) -> torch.Tensor:
    """Channels of different means; channels_last, of any number of dimensions, if ``last``."""
    offset = torch.randn(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    x = torch.randn(shape) * std + mean * (1 + offset)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return in_nan(x.to(dtype))


def vector(*values) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


class Case:
    """One call of the backend, and the same in float64 by the formulas."""

    def __init__(
        self,
        x,
        normalizers=THREE,
        ratio_map='sparsestmax',
        radius=0.3,
        fixed=(0, 0),
        choice=(-1, -1),
        affine=(True, True),
        running=None,
        training=True,
        momentum=0.1,
        correction=0,
        eps=EPS,
        selected=(None, None),
        control=None,
    ):
        self.x, self.channels = x, x.shape[1]
        self.normalizers, self.ratio_map, self.radius = normalizers, ratio_map, radius
        self.fixed, self.choice, self.selected = fixed, choice, selected
        self.momentum, self.correction, self.eps = momentum, correction, eps
        if control is None:
            control = torch.randn(2, len(normalizers), device=DEVICE) / 4
            if ratio_map == 'given':
                control = control.softmax(-1)
        self.control = [in_nan(z) for z in control]
        self.weight, self.bias = (
            in_nan(torch.randn(self.channels)) if keep else None for keep in affine
        )
        self.running = running
        if running is True:
            self.running = [in_nan(torch.randn(self.channels)), in_nan(torch.rand(self.channels))]
        self.training = training
        self.constant = not training and self.running is not None
        self.dy = in_nan(torch.randn_like(x))

    @property
    def settings(self):
        return (self.normalizers, GROUPS, self.correction, self.eps)

    def run(self, **wanted) -> dict[str, torch.Tensor]:
        """What the kernels find."""
        sparse = self.ratio_map == 'sparsestmax'
        scalars = (self.radius, *self.fixed, *self.choice)
        state = [torch.tensor(v, device=DEVICE) if sparse else None for v in scalars]
        y, self.saved, _ = backend.forward(
            self.x,
            *self.control,
            self.ratio_map,
            *state,
            self.weight,
            self.bias,
            *(self.running or (None, None)),
            self.momentum,
            self.training,
            *self.settings,
            self.selected,
        )
        wanted.setdefault('needs_dbias', self.bias is not None)
        gradients = backend.backward(
            self.dy,
            self.x,
            self.saved,
            self.weight,
            self.ratio_map,
            self.constant,
            *self.settings,
            self.selected,
            **wanted,
        )
        return dict(zip(NAMES, (y, *gradients), strict=True))

    def ratios(self, index: int, control: torch.Tensor) -> torch.Tensor:
        """Importance ratios of the mean (0) or variance (1), differentiable."""
        if self.selected[index] is not None:
            one_hot = torch.eye(len(self.normalizers), dtype=control.dtype)[self.selected[index]]
            return one_hot.to(control.device) + 0 * control
        if self.ratio_map == 'given':
            return control
        if self.ratio_map == 'softmax':
            return control.softmax(-1)
        if self.fixed[index]:
            chosen = self.choice[index]
            if chosen < 0:
                chosen = len(control) - 1 - int(control.flip(0).argmax())
            one_hot = torch.eye(len(control), dtype=control.dtype)[chosen]
            return one_hot.to(control.device) + 0 * control
        radius = torch.tensor(self.radius, device=control.device)  # float32, as the buffer
        return SparsestMaxFunction.apply(control, radius)

    def expected(self) -> dict[str, torch.Tensor]:
        """The same by the formulas, in float64."""
        inputs = (self.x, *self.control, self.weight, self.bias)
        leaves = [None if a is None else a.detach().double().requires_grad_() for a in inputs]
        x, *control, weight, bias = leaves
        running = (None, None)
        if self.constant:
            running = [buffer.double() for buffer in self.running]
        y = reference.switchable_norm(
            x,
            *(self.ratios(index, z) for index, z in enumerate(control)),
            weight,
            bias,
            *self.settings,
            *running,
        )
        given = [leaf for leaf in leaves if leaf is not None]
        gradients = iter(torch.autograd.grad(y, given, self.dy.double()))
        found = [None if leaf is None else next(gradients) for leaf in leaves]
        return dict(zip(NAMES, (y, *found), strict=True))

    def check(self, factor: float = 1, **wanted) -> dict[str, torch.Tensor]:
        """Compare all that was found; errors are relative to the norm of a whole tensor."""
        expected = self.expected()
        found = self.run(**wanted)
        for name, value in found.items():
            if value is None:
                assert expected[name] is None or wanted, name
                continue
            tolerance = factor * TOLERANCE[torch.float32]
            if name in ('y', 'dx'):
                assert value.dtype == self.x.dtype
                tolerance = max(tolerance, TOLERANCE[self.x.dtype])
                assert value.shape == self.x.shape
            else:
                assert value.dtype == torch.float32
            if 'control' in name:
                # A sum over all rows of terms of both signs: in units of the terms.
                tolerance *= 20
            size = expected[name].norm()
            error = (value.double() - expected[name]).norm()
            floor = 1e-5 if 'control' in name else 0  # of gradients that are zero by themselves
            assert error <= tolerance * size + floor * self.dy.double().norm(), f'{name}: {error}'
            assert size.isfinite(), name
        return found


# Shapes, layouts, dtypes

SHAPES = {
    'usual': (4, 6, 8, 8),
    'odd sizes': (3, 6, 7, 5),
    'one sample': (1, 6, 9, 8),
    'one position': (4, 6, 1, 1),
    'one sample and one position': (1, 6, 1, 1),
    'one channel per group': (3, 2, 5, 5),
    'vectors': (5, 6),
    'sequences': (3, 6, 11),
    'volumes': (2, 6, 3, 5, 2),
    'more channels than a tile': (2, 130, 3, 3),
    'rows that are split in two, unequal': (1, 2, 97, 173),
}


@pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_shapes(shape, last):
    if last and len(shape) == 2:
        pytest.skip('no position')
    correction = len(shape) % 2
    case = Case(image(*shape, last=last), NORMALIZERS, correction=correction, running=True)
    found = case.check()
    assert found['y'].stride() == found['dx'].stride() == case.x.stride()


@pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, last):
    Case(image(3, 10, 7, 6, dtype=dtype, last=last), NORMALIZERS).check()


@pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels_last'])
def test_many_splits_of_few_rows(last, limits, launches):
    # More than one block of splits to merge, the last one short.
    limits(TILE=32, SPLIT_TILES=1, CHANNELS=2)
    assert backend._tiling(1, 2, 13 * 21, int(not last)).splits > 8
    for normalizers in (THREE, NORMALIZERS):  # GN is pooled by a kernel of its own
        Case(image(1, 2, 13, 21, last=last), normalizers, correction=1, running=True).check()
        assert ('ssn_fwd_pool_kernel' in launches) == ('GN' in normalizers)


@pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('training', [False, True], ids=['running', 'batch'])
@pytest.mark.parametrize('pools', [False, True], ids=['merged', 'pooled'])
def test_who_pools(pools, training, last, limits, launches):
    limits(POOL_TILE=8, POOL_SAMPLES=2, CHUNK=2, **dict(MERGE_NUMBERS=0) if pools else {})
    for shape in ((5, 32, 2, 3), (2, 6, 40, 56), (3, 256, 1, 1)):
        case = Case(image(*shape, last=last), running=True, training=training, correction=int(last))
        before = [buffer.clone() for buffer in case.running]
        launches.clear()
        case.check()
        kernels = ['moments', *['pool'] * pools, 'apply', 'sums', *['pool'] * pools, 'dx']
        assert [name.split('_')[2] for name in launches] == kernels
        changed = not torch.equal(before[0], case.running[0])
        assert changed == training


def test_rows_of_two_samples_in_a_program(launches):
    assert backend._tiling(400, 5, 49, 1).rows > 1
    Case(image(5, 5, 2, 3), running=True).check()
    assert 'ssn_fwd_pool_kernel' in launches
    launches.clear()
    Case(image(5, 5, 2, 3), ('IN', 'BN'), running=True).check()
    assert 'ssn_fwd_pool_kernel' not in launches


OTHER_LAYOUTS = {
    'transposed': lambda x: x.transpose(2, 3),
    'every other position': lambda x: x.repeat_interleave(2, 3)[..., ::2],
    'part of the channels': lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    'expanded over samples': lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize('layout', OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_other_layouts_are_made_contiguous(layout):
    found = Case(layout(image(3, 6, 5, 5))).check()
    assert found['y'].is_contiguous()
    assert found['dx'].is_contiguous()


def test_layout_of_the_upstream_gradient_does_not_matter():
    for last in (False, True):
        case = Case(image(3, 6, 5, 5, last=last))
        expected = case.run()
        dy = case.dy
        for layout in (
            lambda x: x.contiguous(),
            lambda x: x.contiguous(memory_format=torch.channels_last),
            lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            case.dy = layout(dy)
            torch.testing.assert_close(case.run(), expected, rtol=0, atol=0)


def test_vectors_may_have_any_stride():
    def spread(vector):
        return torch.stack((vector, torch.full_like(vector, torch.nan)), 1)[:, 0]

    case = Case(image(3, 6, 5, 5), running=True)
    before = [spread(buffer) for buffer in case.running]
    expected, updated = case.run(), case.running
    case.control = [spread(z) for z in case.control]
    case.weight, case.bias, case.running = spread(case.weight), spread(case.bias), before
    torch.testing.assert_close(case.run(), expected)
    torch.testing.assert_close(case.running, updated, check_stride=False)


# Settings


@pytest.mark.parametrize('ratio_map', ['sparsestmax', 'softmax', 'given'])
@pytest.mark.parametrize('running', [False, True], ids=['batch', 'running'])
@pytest.mark.parametrize('normalizers', ORDERS[::7], ids='-'.join)
def test_normalizers(normalizers, running, ratio_map):
    # Every seventh here, all of them below.
    Case(
        image(3, 4, 3, 3),
        normalizers,
        ratio_map,
        radius=0.05,
        running=running,
        training=not running,
        correction=int(running),
    ).check()


@pytest.mark.slow
@pytest.mark.parametrize('place', range(len(ORDERS)), ids=map('-'.join, ORDERS))
def test_normalizers_in_every_order(place):
    x = image(2, 4, 5, 3, last=place % 4 > 1)
    for ratio_map, running in itertools.product(('sparsestmax', 'softmax'), (False, True)):
        Case(
            x,
            ORDERS[place],
            ratio_map,
            running=running,
            training=not running,
            correction=place % 2,
        ).check()


@pytest.mark.parametrize('affine', [(False, False), (True, False), (False, True)])
def test_without_weight_or_bias(affine):
    found = Case(image(3, 6, 5, 4), affine=affine).check()
    assert (found['dweight'] is None, found['dbias'] is None) == (not affine[0], not affine[1])


def test_only_what_is_wanted():
    case = Case(image(3, 6, 5, 4))
    everything = case.run()
    for place in range(4):
        wanted = [place == other for other in range(4)]
        dx, control, dbias, dweight = wanted
        names = ('needs_dx', 'needs_control', 'needs_dbias', 'needs_dweight')
        found = case.run(**dict(zip(names, wanted, strict=True)))
        for name, kept in zip(NAMES[1:], (dx, control, control, dweight, dbias), strict=True):
            assert (found[name] is not None) == kept
            if kept:
                torch.testing.assert_close(found[name], everything[name], rtol=0, atol=0)


@pytest.mark.parametrize('eps', [0, 0.1])
def test_eps(eps):
    Case(image(3, 6, 5, 4), eps=eps).check()


@pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('only', [None, *THREE])
def test_large_mean_costs_digits_in_proportion(only, last):
    # Distances are computed first: at |mean| / std = 1e4 four digits of float32's seven are lost,
    # as in the input itself, and never eight.
    control = None if only is None else vector(*(float(name == only) for name in THREE))
    x = image(2, 6, 11, 13, mean=0, std=1.0, last=last) + 1e4
    case = Case(x, ratio_map='given', control=None if only is None else [control] * 2)
    found, expected = case.run(), case.expected()
    digits = 1e4 * torch.finfo(torch.float32).eps
    for name in ('y', 'dx', 'dweight', 'dbias'):
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < digits, name


def test_outliers_cost_no_digits():
    # The first position of every row is far from the others: a poor choice for a shift.
    x = image(2, 6, 11, 13, mean=0, std=1.0)
    x[..., 0, 0] = 3e3
    Case(x).check()


def test_constant_rows():
    x = torch.full((2, 4, 5, 5), 0.1, device=DEVICE)
    x[:, 2] = 7
    one = vector(1.0, 0, 0)
    found = Case(x, ratio_map='given', control=[one, one], affine=(False, False)).run()
    assert found['y'].abs().max() < 1e-3
    assert all(value is None or value.isfinite().all() for value in found.values())


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_nan_and_inf_stay_where_they_belong(bad):
    x = image(3, 6, 5, 4)
    x[1, 2, 3, 1] = bad
    one = vector(1.0, 0.0)
    y = Case(x, ('IN', 'LN'), 'given', control=[one, one], selected=(0, 0)).run()['y']
    assert y[1, 2].isnan().all()
    y[1, 2] = 0
    assert y.isfinite().all()


# Running statistics


@pytest.mark.parametrize('shape', [(5, 6, 4, 3), (1, 6, 1, 1)])
@pytest.mark.parametrize('momentum', [0.1, 0.7, 1, 'tensor'])
@pytest.mark.parametrize('correction', [0, 1])
def test_running_statistics(correction, momentum, shape, limits):
    limits(POOL_TILE=8, POOL_SAMPLES=2)
    momentum = torch.tensor(0.25, device=DEVICE) if momentum == 'tensor' else momentum
    case = Case(image(*shape), running=True, momentum=momentum, correction=correction)
    before = [buffer.double() for buffer in case.running]
    case.run()
    mean, var = reference.normalizer_statistics(case.x.double(), 'BN', GROUPS, correction)
    count = case.x.numel() // shape[1]
    factor = 1 if correction or count == 1 else count / (count - 1)
    for buffer, old, new in zip(case.running, before, (mean[0], var[0] * factor), strict=True):
        torch.testing.assert_close(
            buffer.double(), old.lerp(new, float(momentum)), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_parameters_and_buffers_of_other_dtypes(dtype):
    case = Case(image(4, 6, 5, 3), running=True, momentum=0.5)
    before = [buffer.to(dtype) for buffer in case.running]
    expected, updated = case.run(), case.running
    case.weight, case.bias = case.weight.to(dtype), case.bias.to(dtype)
    case.control = [z.to(dtype) for z in case.control]
    case.running = before
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(case.run(), expected, rtol=tolerance, atol=tolerance)
    for buffer, value in zip(case.running, updated, strict=True):
        assert buffer.dtype == dtype
        torch.testing.assert_close(buffer.float(), value, rtol=tolerance, atol=tolerance)


def test_evaluation_leaves_running_statistics_alone():
    case = Case(image(4, 6, 5, 3), running=True, training=False)
    before = [buffer.clone() for buffer in case.running]
    case.run()
    torch.testing.assert_close(case.running, before, rtol=0, atol=0)


@pytest.mark.parametrize('num', [1, 4])
def test_backward_takes_the_running_statistics_of_its_forward(num):
    case = Case(image(num, 6, 5, 3), running=True, training=False)
    expected = case.expected()
    sparse = [torch.tensor(v, device=DEVICE) for v in (case.radius, 0, 0, -1, -1)]
    _, saved, _ = backend.forward(
        case.x, *case.control, 'sparsestmax', *sparse, case.weight, case.bias,
        *case.running, 0.1, False, *case.settings,
    )  # fmt: skip
    for buffer in case.running:
        buffer.fill_(torch.nan)
    dx, *_ = backend.backward(
        case.dy, case.x, saved, case.weight, 'sparsestmax', True, *case.settings
    )
    torch.testing.assert_close(dx.double(), expected['dx'], rtol=1e-5, atol=1e-5)


# Ratios

CONTROLS = {
    2: [(0.0, 0.0), (0.3, -0.2), (5.0, 1.0), (1e-30, 0.0)],
    3: [
        (0.0, 0.0, 0.0),
        (0.2, 0.2, -0.1),
        (-0.1, 0.2, 0.2),
        (0.6, 0.4, -0.3),
        (0.1, 0.3, 0.2),
        (3.0, -1.0, 0.5),
        (1e-30, 0.0, 2e-30),
        (3e38, -3e38, 0.0),
        (1e-8, 0.0, 0.0),
        (0.9, 0.9, 0.9),
        (0.0, 1e-7, 0.0),
        (1.0, 6e-8, 0.0),
        (0.0, 1.0, -5e-8),
        (torch.nan, 0.0, 0.0),
        (torch.inf, 0.0, 0.0),
        (0.0, -torch.inf, 0.0),
    ],
    4: [(0.0, 0.0, 0.0, 0.0), (0.4, 0.1, 0.1, 0.3), (0.1, 0.2, 0.2, 0.0), (-0.3, 0.6, 0.1, 0.5)],
}


BEYOND = 1 - 2**-23  # of the circumradius: it counts as the circumradius
FEW = [(3, -1.0), (3, 0.35), (3, BEYOND), (4, 0.72), (2, 0.72)]
PARTS = (-1.0, 0.0, 0.1, 0.35, 0.52, 0.72, 0.9, 0.999, BEYOND, 1.2)
MANY = [values for values in itertools.product(CONTROLS, PARTS) if values not in FEW]


@pytest.mark.parametrize(
    ('size', 'part'), FEW + [pytest.param(*values, marks=pytest.mark.slow) for values in MANY]
)
def test_sparsestmax(size, part):
    # By ratios and by how they move: two vectors per launch, gradients through a small layer.
    radius = part * circumradius(size)
    normalizers = NORMALIZERS[:size]
    vectors = CONTROLS[size]
    for pair in zip(vectors[::2], vectors[1::2], strict=True):
        control = torch.tensor(pair, device=DEVICE)
        case = Case(image(1, 2, 3), normalizers, radius=radius, control=control)
        found = case.run()
        ratios = case.saved[:32].reshape(2, 16)[:, :size]
        exact = control.double().requires_grad_()
        expected = SparsestMaxFunction.apply(exact, torch.tensor(radius, device=DEVICE))
        torch.testing.assert_close(
            ratios.double(), expected.detach(), rtol=1e-5, atol=2e-6, equal_nan=True
        )
        in_float = SparsestMaxFunction.apply(control, torch.tensor(radius, device=DEVICE))
        assert torch.equal(ratios == 1, in_float == 1)
        # (1, 6e-8, 0) is one-hot but for rounding.
        assert (ratios[(ratios == 1).any(-1)].sort().values[:, :-1] == 0).all()
        raw = Case(case.x, normalizers, 'given', control=ratios)
        raw.weight, raw.bias, raw.dy = case.weight, case.bias, case.dy
        upstream = raw.run()
        upstream = torch.stack([upstream[name] for name in CONTROL_GRADIENTS]).double()
        if not ratios.isfinite().all():
            continue
        (dz,) = torch.autograd.grad(expected, exact, upstream)
        moved = torch.stack([found[name] for name in CONTROL_GRADIENTS]).double()
        # Near a tie the slope is up to a million, of the rounding errors of dp too.
        slope = case.saved[:32].reshape(2, 16)[:, 12].max().clamp(min=1)
        atol = 3e-7 * (slope * upstream.abs().max()).item() + 1e-5 * dz.abs().max().item()
        torch.testing.assert_close(moved, dz, rtol=1e-4, atol=atol)
        # Two entries on a circle of given radius cannot move, whatever the slope.
        distance = (ratios - 1 / size).norm(dim=-1)
        on_circle = ((ratios > 0).sum(-1) == 2) & ((distance - radius).abs() < 1e-5)
        assert (moved[on_circle & (dz == 0).all(-1)] == 0).all()


@pytest.mark.skipif(DEVICE == 'cuda', reason='there the rounding is what it is')
@pytest.mark.parametrize('toward', [-math.inf, math.inf])
def test_which_ratios_are_one_does_not_hang_on_the_last_digit(toward, monkeypatch):
    # Square root and division of a GPU may miss it by two, even where the result is exact.
    from triton.runtime.interpreter import InterpreterBuilder

    def missing(operation):
        def call(self, *args):
            found = operation(self, *args)
            if found.data.dtype == np.float32:
                for _ in range(2):
                    found.data = np.nextafter(found.data, np.float32(toward))
            return found

        return call

    for name in ('create_sqrt', 'create_fdiv'):
        monkeypatch.setattr(InterpreterBuilder, name, missing(getattr(InterpreterBuilder, name)))
    pairs = [((0.6, 0.4, -0.3), (0.0, 0.0, 0.0)), ((3.0, -1.0, 0.5), (1.0, 6e-8, 0.0))]
    for pair, part in itertools.product(pairs, (0.72, 1 - 1.3 * 2**-22, BEYOND, 1.0)):
        control = torch.tensor(pair, device=DEVICE)
        radius = part * circumradius(3)
        case = Case(image(1, 2, 3), radius=radius, control=control)
        case.run()
        ratios = case.saved[:32].reshape(2, 16)[:, :3]
        exact = SparsestMaxFunction.apply(control, torch.tensor(radius))
        assert torch.equal(ratios == 1, exact == 1), (pair, part)
        torch.testing.assert_close(ratios, exact, rtol=1e-5, atol=2e-6)


def test_undefined_control_parameters_have_undefined_gradients():
    for bad in (torch.nan, torch.inf, -torch.inf):
        control = torch.tensor([[bad, 0.0, 0.0], [0.1, 0.2, 0.5]], device=DEVICE)
        found = Case(image(1, 2, 3), control=control).run()
        assert found['y'].isnan().all()
        assert found['dmean_control'].isnan().all()
    found = Case(image(1, 2, 3), radius=torch.nan).run()
    assert found['y'].isnan().all()


@pytest.mark.parametrize(
    ('fixed', 'choice'),
    [((1, 1), (0, 2)), ((1, 0), (1, -1)), ((0, 1), (0, -1)), ((1, 1), (-1, -1)), ((3, 1), (2, 0))],
)
def test_fixed(fixed, choice):
    # The largest is a tie: the last one of it counts.
    control = torch.tensor([[0.3, 0.1, 0.3], [0.7, 0.7, -0.2]], device=DEVICE)
    found = Case(image(3, 4, 3, 3), control=control, fixed=fixed, choice=choice).check()
    for name, is_fixed in zip(CONTROL_GRADIENTS, fixed, strict=True):
        assert (found[name] == 0).all() == bool(is_fixed)


def test_fixed_ratios_do_not_look_at_the_control_parameters():
    control = torch.full((2, 3), torch.nan, device=DEVICE)
    case = Case(image(3, 4, 3, 3), control=control, fixed=(1, 1), choice=(2, 0))
    found = case.run()
    case.control = [torch.zeros_like(z) for z in case.control]
    torch.testing.assert_close(found, case.run(), rtol=0, atol=0)


# What is known on the CPU


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'selected', [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (2, 0), (1, None), (None, 2)]
)
def test_selected(selected, training):
    found = Case(
        image(3, 4, 5, 3), NORMALIZERS, running=True, training=training, selected=selected
    ).check()
    for name, known in zip(CONTROL_GRADIENTS, selected, strict=True):
        assert known is None or (found[name] == 0).all()


def test_batch_norm_in_evaluation_is_one_pass(launches):
    case = Case(image(3, 4, 5, 3), running=True, training=False, selected=(2, 2))
    case.run()
    assert launches == ['ssn_fwd_apply_kernel', 'ssn_bwd_sums_kernel', 'ssn_bwd_dx_kernel']
    assert case.saved.numel() < 32 + 2 * (4 + 3) + 1  # nothing per row
    launches.clear()
    case.run(needs_dweight=False, needs_dbias=False)
    assert launches == ['ssn_fwd_apply_kernel', 'ssn_bwd_dx_kernel']


def test_what_is_decided_needs_no_other_statistics(launches):
    case = Case(image(3, 32, 5, 3), running=True, selected=(1, 1), affine=(False, False))
    case.running = [buffer.fill_(7) for buffer in case.running]
    case.run()
    assert launches == [
        'ssn_fwd_moments_kernel',
        'ssn_fwd_apply_kernel',
        'ssn_bwd_sums_kernel',
        'ssn_bwd_dx_kernel',
    ]
    assert all((buffer == 7).all() for buffer in case.running)


# What runs where a layer is decided on IN and a program keeps whole rows.
WHOLE = ['ssn_fwd_apply_kernel', 'ssn_bwd_dx_kernel', 'ssn_bwd_pool_kernel']


@pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('size', [(1, 1), (5, 3), (10, 8), (29, 31), (90, 91)])
def test_a_layer_decided_on_instance_norm_reads_x_once(size, last, launches):
    case = Case(image(3, 5, *size, last=last), running=True, selected=(0, 0), correction=int(last))
    case.check()
    if last and size == (90, 91):
        assert launches != WHOLE  # 8 such rows are more than a program can keep
    else:
        assert launches == WHOLE


@pytest.mark.parametrize('wanted', list(itertools.product((False, True), repeat=3)))
def test_gradients_of_a_layer_decided_on_instance_norm(wanted, launches):
    case = Case(image(2, 36, 5, 3, dtype=torch.bfloat16), selected=(0, 0))
    dx, dbias, dweight = wanted
    case.check(needs_dx=dx, needs_dbias=dbias, needs_dweight=dweight)
    assert launches[:1] == WHOLE[:1]
    if dx:
        assert launches == WHOLE[: 2 + (dbias or dweight)]


def test_launches_of_an_undecided_layer(launches):
    Case(image(3, 32, 5, 3)).run()
    assert launches == [
        'ssn_fwd_moments_kernel',
        'ssn_fwd_apply_kernel',
        'ssn_bwd_sums_kernel',
        'ssn_bwd_dx_kernel',
    ]


def test_what_is_saved_is_small():
    x = image(2, 8, 30, 30)
    case = Case(x, NORMALIZERS)
    case.run()
    assert case.saved.numel() == 32 + 2 * (2 * 8) + 2 * (8 + 2 + 2 * GROUPS)


# The cut into programs


@pytest.mark.parametrize('axis', [0, 1])
def test_programs_cover_x_once(axis):
    shapes = itertools.product((1, 2, 3, 64, 1000), (1, 3, 64, 100, 2048), (1, 7, 49, 1050, 268800))
    for num, channels, length in shapes:
        rows, positions, per_program, splits, programs = backend._tiling(
            num, channels, length, axis
        )
        assert all(size & (size - 1) == 0 for size in (rows, positions))
        assert rows * positions <= backend._TILE
        chunk = per_program * positions
        assert (splits - 1) * chunk < length <= splits * chunk  # none is empty
        blocks = num * math.ceil(channels / rows) if axis == 0 else math.ceil(num * channels / rows)
        assert programs == blocks * splits
        assert splits == 1 or chunk >= backend._SPLIT_TILES * positions
        whole = backend._whole_tiling(num, channels, length, axis)
        if whole is not None:
            assert length <= whole.positions < max(2 * length, 2)
            assert whole.rows * whole.positions <= backend._WHOLE
            rows = channels if axis == 0 else num * channels
            assert whole.programs == math.ceil(rows / whole.rows) * (num if axis == 0 else 1)


def test_stem_of_two_images_fills_the_chip():
    assert backend._tiling(2, 64, 400 * 672, 1).programs > 4 * 132
    # In channels_last a sample's rows are one block: at most 64 splits, which have to be merged.
    assert backend._tiling(2, 64, 400 * 672, 0).programs > 3 * 132


@triton.jit
def addresses_kernel(
    first_out, tile_out, N, C, S, per_program, block, split, tile,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The row numbers of a block, and the addresses of one of its tiles."""
    N = tiles.widened(N, True)
    row, n, c, there, _sample, origin, offset = tiles.row_block(block, N, C, S, ROWS, AXIS)
    first, last = tiles.position_range(split, N, S, per_program, False, POSITIONS)
    _, offsets = tiles.tile_offsets(offset, C, POSITIONS, AXIS)
    at = tiles.tile_start(origin, first + tile * POSITIONS, C, AXIS)
    rows = tl.arange(0, ROWS)
    tl.store(first_out + rows, row)
    tl.store(first_out + ROWS + rows, n)
    tl.store(first_out + 2 * ROWS + rows, c)
    tl.store(first_out + 3 * ROWS + rows, there.to(tl.int64))
    tl.store(first_out + 4 * ROWS, first)
    tl.store(first_out + 4 * ROWS + 1, last)
    where = tl.expand_dims(rows, AXIS) * POSITIONS
    where += tl.expand_dims(tl.arange(0, POSITIONS), 1 - AXIS)
    tl.store(tile_out + where, at + offsets)


@pytest.mark.parametrize(
    ('axis', 'shape', 'rows', 'block'),
    [
        (1, (90000, 70000, 49), 8, 787_000_123),
        (1, (3, 5, 2**33 + 5), 1, 13),
        (0, (70000, 65000, 49), 64, 71_000_017),
        (0, (3, 70, 2**33 + 5), 64, 5),
    ],
)
def test_addresses_beyond_32_bits(axis, shape, rows, block):
    # The arithmetic that all passes over x share, with no x of that size in memory.
    num, channels, length = shape
    positions, per_program, tile = 8, 3, 2
    split = (length - 1) // (positions * per_program) if length > 2**31 else 1
    first_out = torch.full((4 * rows + 2,), -1, device=DEVICE)
    tile_out = torch.full((rows, positions), -1, device=DEVICE)
    addresses_kernel[(1,)](
        first_out, tile_out, *shape, per_program, block, split, tile,
        ROWS=rows, POSITIONS=positions, AXIS=axis,
    )  # fmt: skip
    found = first_out[:-2].reshape(4, rows).tolist()
    first = split * per_program * positions
    assert first_out[-2:].tolist() == [first, min(first + per_program * positions, length)]
    assert tile_out.max() > 2**32
    for lane in range(rows):
        if axis == 1:
            n, c = divmod(block * rows + lane, channels)
        else:
            n, block_of_sample = divmod(block, math.ceil(channels / rows))
            c = block_of_sample * rows + lane
        assert found[3][lane] == int(n < num and c < channels)
        assert [line[lane] for line in found[:3]] == [n * channels + c, n, c]
        for position in range(positions):
            s = first + tile * positions + position
            expected = (n * channels + c) * length + s
            if axis == 0:
                expected = (n * length + s) * channels + c
            assert tile_out[lane, position] == expected


# Operators, compilation


def test_cpu_tensors_are_left_to_eager():
    assert not backend.supports(torch.zeros(2, 3))
    assert not backend.supports(torch.zeros(2, 3, dtype=torch.float64, device=DEVICE))


def operator_arguments(case: Case) -> tuple:
    """Arguments of the custom operators for the calls that ``case`` makes."""
    state = [torch.tensor(v, device=DEVICE) for v in (case.radius, *case.fixed, *case.choice)]
    settings = (list(case.normalizers), *case.settings[1:])
    forward = (
        case.x, *case.control, case.ratio_map, *state, case.weight, case.bias, *case.running,
        case.momentum, None, case.training, *settings, *case.selected,
    )  # fmt: skip
    _, saved = torch.ops.ssn_plugin.switchable_norm_forward(*forward)
    backward = (
        case.dy, case.x, saved, case.weight, case.ratio_map, case.constant, *settings,
        *case.selected,
    )  # fmt: skip
    return forward, backward


@pytest.mark.parametrize(('last', 'training'), [(False, True), (True, False)])
def test_custom_operators(last, training, monkeypatch):
    # No guards: opcheck compares where in its storage a tensor begins, and also those of the saved
    # numbers that nobody needs.
    monkeypatch.setattr(backend, '_image', torch.empty_like)
    monkeypatch.setattr(
        backend, '_vector', lambda size, like: torch.zeros(size, device=like.device)
    )
    case = Case(image(2, 4, 3, 2, last=last), running=True, training=training)
    forward, backward = operator_arguments(case)
    library.opcheck(torch.ops.ssn_plugin.switchable_norm_forward, forward)
    library.opcheck(torch.ops.ssn_plugin.switchable_norm_backward, backward)
    expected = case.run()
    found = torch.ops.ssn_plugin.switchable_norm_backward(*backward)
    torch.testing.assert_close(found, tuple(expected.values())[1:])


def test_custom_operators_return_empty_for_none():
    case = Case(image(2, 4, 3, 2), running=True, training=False, selected=(2, 2))
    _, backward = operator_arguments(case)
    found = torch.ops.ssn_plugin.switchable_norm_backward(*backward, False, False, False)
    assert [value.numel() for value in found] == [0, 0, 0, 4, 0]


class Function(torch.autograd.Function):
    """How a layer uses the operators under torch.compile."""

    @staticmethod
    def forward(ctx, x, control, weight, state, running, momentum):
        y, saved = torch.ops.ssn_plugin.switchable_norm_forward(
            x, *control, 'sparsestmax', *state, weight, None, *running, 0.0, momentum, True,
            list(THREE), GROUPS, 0, EPS,
        )  # fmt: skip
        ctx.save_for_backward(x, saved, weight)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, dmean, dvar, dweight, _ = torch.ops.ssn_plugin.switchable_norm_backward(
            dy, *ctx.saved_tensors, 'sparsestmax', False, list(THREE), GROUPS, 0, EPS
        )
        return dx, torch.stack((dmean, dvar)), dweight, None, None, None


def test_traces_as_one_graph():
    # Running statistics are changed inside of the graph, by a momentum that is computed in it.
    case = Case(image(3, 4, 5, 3), running=True, affine=(True, False))
    state = torch.tensor([0.3, 0, 0, -1, -1], device=DEVICE)
    count = torch.ones((), device=DEVICE)

    def layer(x, control, weight, count, *running):
        state_and_choice = [state[0], *(state[1:].long())]
        count.add_(1)
        return Function.apply(
            x * 2, control, weight, state_and_choice, running, count.reciprocal()
        ).relu()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend='aot_eager')):
        leaves = [case.x, torch.stack(case.control), case.weight]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        buffers = [count.clone(), *(buffer.clone() for buffer in case.running)]
        for _ in range(2):
            y = function(*leaves, *buffers)
            y.backward(case.dy)
        results.append((y, [leaf.grad for leaf in leaves], buffers))
    torch.testing.assert_close(*results)
    assert results[0][2][0] == 3


def test_a_layer_on_another_device_is_refused():
    # A compiled kernel that is launched directly would take the address as one of its own.
    vector = torch.zeros(3)
    assert backend._kinds([vector, None], vector) == (-1, torch.float32, torch.float32, None)
    x = SimpleNamespace(get_device=lambda: 0, device='cuda:0', dtype=torch.float32)
    for place, name in ((0, 'mean_control'), (8, 'bias'), (11, 'momentum')):
        given = [vector if index == place else None for index in range(12)]
        with pytest.raises(RuntimeError, match=rf'^{name}: .* cpu, expected cuda:0.*layer\.to'):
            backend._kinds(given, x)


def compiled(folder: Path, *what: str) -> list[str]:
    """What compile_kernels.py says, in a process in which Triton compiles."""
    if TRITON < (3, 3):
        pytest.skip("of the compiler's own interface, which changed in Triton 3.3")
    result = subprocess.run(
        [sys.executable, Path(__file__).parent / 'compile_kernels.py', *what],
        env={**os.environ, 'TRITON_INTERPRET': '0', 'TRITON_CACHE_DIR': str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout.splitlines()


def test_whatever_a_layer_can_launch_has_types(tmp_path):
    # The interpreter knows nothing of types, and skips branches that the compiler does not.
    *_, counts, total = compiled(tmp_path, 'variants')
    assert {pair.split('=')[0] for pair in counts.split()} == set(kernels.__all__) - {PROBE}
    assert total.endswith(', 0 failed')


@pytest.mark.slow
def test_kernels_keep_to_their_registers(tmp_path):
    # At the benchmark's inputs among others. More would leave too few programs on a chip. The
    # compilers of Triton 3.5 and 3.6 give dx at 32 x 512 x 7 x 7 up to 154, and put two numbers of
    # a few kernels into memory; 3.7 and 3.8 were not tried.
    most, in_memory = (128, 0) if TRITON >= (3, 9) else (160, 8)
    lines = compiled(tmp_path, 'machine', '80', '90')
    found = {tuple(line.split()[:2]) for line in lines}
    generations = ('sm_80', 'sm_90')
    assert found == set(itertools.product(set(kernels.__all__) - {PROBE}, generations))
    for line in lines:
        registers, spilled = re.search(r'(\d+) registers, (\d+) bytes spilled', line).groups()
        assert int(registers) <= most, line
        assert int(spilled) <= in_memory, line


def test_direct_launches():
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', Path(__file__).parent / 'direct_launches.py'],
        env={**os.environ, 'TRITON_INTERPRET': '0'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
