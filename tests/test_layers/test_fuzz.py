"""Whatever comes in: the answer of the formulas in float64, or a clear ValueError.

The 2000 inputs are the same in every run of the same tests. SSN_FUZZ_CASES=20000 tries that many,
and others in every run; hypothesis's ``--hypothesis-seed`` repeats one.
"""

import datetime
import math
import os
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_state import randomize_affine_and_running

from ssn_plugin import SSN, SelectedNorm, SSN1d, SSN2d, SSN3d, set_radius, sparsestmax
from ssn_plugin.ops import reference

CASES = int(os.environ.get('SSN_FUZZ_CASES', '2000'))
NORMALIZERS = ('IN', 'LN', 'BN', 'GN')
# Spacing of the dtype in which a layer computes, and of the one in which it answers.
SPACING = {
    torch.float64: (2.0**-52, 0.0),
    torch.float32: (2.0**-23, 0.0),
    torch.bfloat16: (2.0**-23, 2.0**-8),
    torch.float16: (2.0**-23, 2.0**-11),
}


def fuzz(share: int) -> settings:
    """The settings of a test that gets one in so many of the cases."""
    return settings(
        max_examples=CASES // share,
        derandomize='SSN_FUZZ_CASES' not in os.environ,
        database=None,
        deadline=datetime.timedelta(seconds=30),  # what takes longer hangs
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def layouts(draw) -> dict:
    """A shape, what is in it and how it lies in memory."""
    sizes = st.sampled_from([1, 2, 3, 5, 0, 8])
    shape = (
        draw(st.sampled_from([2, 3, 1, 4, 0])),
        draw(st.sampled_from([4, 1, 2, 6, 8, 32])),
        *draw(st.lists(sizes, min_size=0, max_size=3)),
    )
    return dict(
        shape=shape,
        layout=draw(
            st.sampled_from(
                ['contiguous', 'channels_last', 'expanded', 'strided', 'transposed', 'offset']
            )
        ),
        values=draw(
            st.sampled_from(
                ['normal', 'far', 'constant', 'tiny', 'denormal', 'huge', 'nan', 'inf', 'mixed']
            )
        ),
        dtype=draw(st.sampled_from(list(SPACING))),
    )


@st.composite
def layers(draw, channels: int) -> tuple[dict, dict]:
    """Arguments of an SSN, and its state."""
    names = draw(st.permutations(NORMALIZERS))[: draw(st.integers(2, 4))]
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    arguments = dict(
        num_features=channels,
        normalizers=tuple(names),
        num_groups=draw(st.sampled_from(divisors)),
        correction=draw(st.sampled_from([0, 1])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        momentum=draw(st.sampled_from([0.1, None, 1, 0.0])),
        affine=draw(st.booleans()),
        track_running_stats=draw(st.booleans()),
    )
    state = dict(
        control=draw(st.sampled_from(['near', 'tie', 'one-hot', 'far apart'])),
        radius=draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.8, math.sqrt(2 / 3), 1.0])),
        through_set_radius=draw(st.booleans()),
        half=draw(st.booleans()),
        training=draw(st.booleans()),
    )
    return arguments, state


@st.composite
def cases(draw) -> tuple:
    layout = draw(layouts())
    return layout, *draw(layers(layout['shape'][1])), draw(st.integers(0, 2**16))


def in_memory(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The numbers of x, lying in memory as asked for where its shape allows."""
    if layout == 'channels_last':
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == 'expanded' and len(x) > 0:
        return x[:1].expand(x.shape)
    if layout == 'strided':
        return torch.stack((x, x.flip(0)), -1)[..., 0]
    if layout == 'transposed':
        return x.mT.contiguous().mT
    if layout == 'offset':
        return torch.cat((x.flatten()[:0].new_zeros(1), x.flatten()))[1:].view(x.shape)
    return x


def input_of(shape, layout, values, dtype) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    if values == 'far':
        x = x + 30
    elif values == 'constant':
        x = torch.full_like(x, 1.7)
    elif values == 'tiny':
        x = x * 1e-4
    elif values == 'denormal':
        x = x * 3 * torch.finfo(dtype).smallest_normal / 16
    elif values == 'huge':
        # Squares, and sums of them, fit into float32 by a little.
        x = x * (10.0 ** torch.randint(8, 16, ()) if dtype != torch.float16 else 2e4)
    elif values in ('nan', 'inf') and x.numel():
        x.view(-1)[torch.randint(x.numel(), ())] = float(values)
    elif values == 'mixed':
        top = 1 if dtype == torch.float16 else 4  # variances and gradients have to fit too
        x = x * 10.0 ** torch.randint(-3, top, (shape[1],)).view(-1, *[1] * (len(shape) - 2))
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max) if values == 'huge' else x
    return in_memory(x.to(dtype), layout)


def layer_of(arguments: dict, state: dict, dtype: torch.dtype) -> SSN:
    layer = SSN(**arguments)
    count = len(arguments['normalizers'])
    with torch.no_grad():
        for control in (layer.mean_weight, layer.var_weight):
            if state['control'] == 'near':
                control.copy_(torch.randn(count) * 0.1)
            elif state['control'] == 'far apart':
                control.copy_(torch.randn(count))
            elif state['control'] == 'one-hot':
                control[torch.randint(count, ())] = 1.5
        randomize_affine_and_running(layer)
    if state['through_set_radius']:
        set_radius(layer, state['radius'])
    else:
        layer.radius.fill_(state['radius'])
    if dtype == torch.float64 or (state['half'] and state['control'] != 'near'):
        layer.to(dtype)
    return layer.train(state['training'])


def expected_ratios(layer: SSN, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Importance ratios by the recursion of the paper, and the control parameters behind them."""
    control = getattr(layer, f'{name}_weight').detach()
    control_dtype, control = control.dtype, control.double()
    found = getattr(layer, f'{name}_ratios').double()
    assert bool((found >= 0).all())
    assert found.sum().item() == pytest.approx(1, abs=1e-2)
    largest = math.sqrt((len(control) - 1) / len(control))
    radius = min(layer.radius.item(), largest)
    centred = found - 1 / len(control)
    assert centred.norm().item() > radius - 1e-2  # control parameters may be of half precision
    snapped = control_dtype in (torch.float16, torch.bfloat16) and bool(found.max() == 1)
    if snapped or bool(getattr(layer, f'{name}_fixed')):
        # In half precision a ratio that rounds to one is one.
        return found, None
    radius = layer.radius.double()
    if len(set(control.tolist())) < len(control):
        return sparsestmax(control, radius), None  # the recursion does not know ties
    control.requires_grad_()
    return reference.sparsestmax(control, radius.item()), control


def check_close(found, expected, spacing, condition, what):
    """Within the rounding errors that the condition of the problem allows."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    roundings = 512 * spacing[0]  # of sums over up to a few thousand elements
    bound = (roundings * condition + 2 * spacing[1]) * scale + roundings * condition
    error = (found.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= bound, f'{what}: error {error:.3g}, bound {bound:.3g}, scale {scale:.3g}'


def check_case(layout: dict, arguments: dict, state: dict, seed: int) -> None:
    torch.manual_seed(seed)
    dtype = layout['dtype']
    x = input_of(**layout)
    layer = layer_of(arguments, state, dtype)
    spacing = SPACING[dtype]
    running = None if layer.running_mean is None else (layer.running_mean, layer.running_var)
    before = [value.clone().double() for value in running or ()]
    (p, control_p), (q, control_q) = (expected_ratios(layer, name) for name in ('mean', 'var'))

    leaf = x.detach().requires_grad_()
    of_one_number = {'IN', 'GN'} if layer.num_groups == layer.num_features else {'IN'}
    undecided = not (layer.mean_fixed and layer.var_fixed)
    if x.dim() == 2 and layer.training and undecided and of_one_number & set(layer.normalizers):
        with pytest.raises(ValueError, match='in training, where'):
            layer(leaf)
        return
    y = layer(leaf)
    upstream = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    y.backward(upstream)
    assert y.shape == x.shape
    assert y.dtype == dtype
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert leaf.grad.shape == x.shape
    if x.numel() == 0:
        assert all(bool((g == 0).all()) for g in gradients.values())
        assert all(torch.equal(a.double(), b) for a, b in zip(running or (), before, strict=True))
        return

    # By the formulas, with the candidates whose ratio is not zero.
    uses_running = running is not None and not state['training']
    active = [k for k in range(len(p)) if p[k] != 0 or q[k] != 0]
    values = x.detach().double().requires_grad_()
    weight, bias = (
        None if v is None else v.detach().double().requires_grad_()
        for v in (layer.weight, layer.bias)
    )
    settings_of = dict(
        normalizers=[layer.normalizers[k] for k in active],
        num_groups=layer.num_groups,
        correction=layer.correction,
        eps=layer.eps,
        running_mean=before[0] if uses_running else None,
        running_var=before[1] if uses_running else None,
    )
    expected = reference.switchable_norm(values, p[active], q[active], weight, bias, **settings_of)
    if layout['values'] in ('nan', 'inf'):
        # What does not touch the bad element is as it should be, what does is not a number. (IN of
        # one position is its bias, whatever comes in.)
        sane, finite = expected.isfinite(), y.isfinite()
        if x.numel() > x.shape[0] * x.shape[1]:
            if layout['values'] == 'nan':  # the variance of an inf is one, and hides it
                assert not bool((finite & ~sane).any())
            bad = (~x.isfinite()).flatten(2).any(-1)
            reached = bad.any(0, keepdim=True) | bad.any(1, keepdim=True)
            lost = (sane & ~finite).flatten(2).any(-1)
            assert not bool((lost & ~reached).any())  # its sample and its channel at most
        kept = sane & finite
        check_close(y[kept], expected[kept].detach(), spacing, 1e4, 'y')
        return

    fits = expected.detach().to(dtype).isfinite()  # float16 ends at 65504
    assert bool(y[fits].isfinite().all())
    in_float16 = layer.mean_weight.dtype == torch.float16
    if not bool(fits.all()) or (in_float16 and layout['values'] == 'huge'):
        return  # nor do its gradients and statistics fit
    assert bool(leaf.grad.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    if running is not None:
        assert all(bool(value.isfinite().all()) for value in running)
    statistics = [
        reference.normalizer_statistics(values.detach(), name, layer.num_groups, layer.correction)
        for name in layer.normalizers
    ]
    if uses_running and 'BN' in layer.normalizers:
        shape = statistics[0][0].shape
        statistics[layer.normalizers.index('BN')] = tuple(v.expand(shape) for v in before)
    var = sum(r.item() * s[1].clamp(min=0) for r, s in zip(q, statistics, strict=True))
    rstd = (var + layer.eps).rsqrt().max().item()
    condition = 1 + x.detach().double().abs().max().item() * rstd
    # The literal formulas lose digits by E[x^2] - E[x]^2, in float64 and to the second power.
    lost = condition + condition**2 * 2.0**-52 / spacing[0]
    check_close(y, expected.detach(), spacing, lost, 'y')

    found_of = dict(
        dx=leaf.grad,
        dweight=gradients.get('weight'),
        dbias=gradients.get('bias'),
        dmean=gradients['mean_weight'],
        dvar=gradients['var_weight'],
    )
    sources = (values, weight, bias, control_p, control_q)
    leaves = {n: v for n, v in zip(found_of, sources, strict=True) if v is not None}
    theirs = torch.autograd.grad(
        expected, list(leaves.values()), upstream.double(), allow_unused=True
    )
    size = math.sqrt(x.numel())
    for name, gradient in zip(leaves, theirs, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(found_of[name], dtype=torch.float64)
        steep = rstd * size if name == 'dx' else size
        if name in ('dmean', 'dvar'):
            # The Jacobian of SparsestMax divides by the distance to a tie.
            control = control_p if name == 'dmean' else control_q
            centred = control.detach() - control.detach().mean()
            steep *= condition / min(1.0, centred.sort().values.diff().min().item())
        check_close(found_of[name], gradient, spacing, steep * condition**2, name)
    for name, control in (('mean_weight', control_p), ('var_weight', control_q)):
        if bool(getattr(layer, f'{name[:-7]}_fixed')):
            assert bool((gradients[name] == 0).all())
            assert control is None


@fuzz(1)
@given(cases())
def test_layer_answers_as_the_formulas_do(case):
    check_case(*case)


SOMETHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(['', 'BN', 'all', (), (1,), [], {}, 1 + 2j, torch.tensor(2), torch.ones(2)]),
)
NAMES = st.one_of(
    SOMETHING,
    st.lists(st.sampled_from([*NORMALIZERS, 'bn', 3, None]), max_size=5),
    st.permutations(NORMALIZERS).map(lambda names: names[:3]),
)
NUM_FEATURES = st.one_of(st.integers(1, 33), SOMETHING)
OPTIONAL = dict(
    eps=SOMETHING,
    momentum=SOMETHING,
    affine=st.booleans(),
    track_running_stats=st.booleans(),
    num_groups=SOMETHING,
    correction=SOMETHING,
)
ARGUMENTS = st.fixed_dictionaries(
    {'num_features': NUM_FEATURES}, optional=dict(OPTIONAL, normalizers=NAMES, radius=SOMETHING)
)
SOURCE = st.one_of(st.sampled_from(NORMALIZERS), SOMETHING)
SOURCES = st.fixed_dictionaries(
    {'num_features': NUM_FEATURES, 'mean_source': SOURCE, 'var_source': SOURCE}, optional=OPTIONAL
)


def check_constructor(kind, arguments: dict) -> None:
    try:
        layer = kind(**arguments)
    except ValueError as error:
        text = str(error)
        name = re.match(r'(\w+): got .*, expected ', text, re.DOTALL)
        assert name, text
        assert name[1] in arguments or name[1] == 'num_groups'
        assert '\n' not in text
        return
    dims = {SSN1d: 3, SSN3d: 5}.get(kind, 4)
    x = torch.randn(2, layer.num_features, *[3] * (dims - 2))
    for training in (True, False):
        y = layer.train(training)(x)
        assert bool(y.isfinite().all()) or not layer.eps > 0
    assert repr(layer)


@fuzz(4)
@given(ARGUMENTS, st.sampled_from([SSN, SSN1d, SSN2d, SSN3d]))
def test_constructor_takes_an_argument_or_names_it(arguments, kind):
    check_constructor(kind, arguments)


@fuzz(8)
@given(SOURCES)
def test_constructor_of_what_a_decided_layer_collapses_to(arguments):
    check_constructor(SelectedNorm, arguments)


@fuzz(8)
@given(
    st.lists(st.sampled_from([0, 1, 2, 4, 5]), min_size=0, max_size=6),
    st.sampled_from(
        [torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8]
    ),
    st.sampled_from([SSN, SSN1d, SSN2d, SSN3d]),
)
def test_other_tensors_are_taken_or_named(shape, dtype, kind):
    layer = kind(4).train(len(shape) != 2)  # in training 'IN' is not for (N, C)
    x = torch.ones(shape).to(dtype)
    dims = {SSN1d: (2, 3), SSN2d: (4,), SSN3d: (5,)}.get(kind, (2, 3, 4, 5))
    fits = len(shape) in dims and shape[1] == 4 and dtype.is_floating_point
    if fits:
        assert bool(layer(x).isfinite().all())
        return
    with pytest.raises(ValueError, match=r'^x: got .*, expected '):
        layer(x)
