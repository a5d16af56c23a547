"""SyncSSN in several processes equals SSN on the joined batch; its collectives; conversion."""

import copy
import pickle

import pytest
import torch
from processes import run_processes
from since import require_kernels
from synced_cases import CASES, CHANNELS, Case, run_cases
from torch import nn

from ssn_plugin import (
    SSN,
    SSN2d,
    SyncSSN,
    convert_sync_ssn,
    revert_sync_ssn,
    set_radius,
    sparsestmax,
)
from ssn_plugin.ops import reference

# Relative, of a whole tensor; dx of few elements may be what is left of terms of the size of dy.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.fixture(
    scope='module',
    params=[(2, 'eager'), (3, 'eager'), (2, 'triton')],
    ids=['2 processes', '3 processes', '2 processes on the kernels'],
)
def found(request, tmp_path_factory) -> list[dict]:
    """What every process computed in every case."""
    world, backend = request.param
    if backend == 'triton':
        require_kernels()
    folder = tmp_path_factory.mktemp('processes')
    return run_processes(run_cases, world, folder, backend, seconds=300)


def joined_moments(case: Case, xs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean and variance of every channel over the elements of all processes, and their number."""
    rows = [
        (mean, second + mean**2, x.numel() // (len(x) * CHANNELS))
        for x in xs
        if x.numel()
        for mean, second in [
            reference.normalizer_statistics(x, 'IN', correction=case.settings.get('correction', 0))
        ]
    ]
    count = sum(len(mean) * length for mean, _, length in rows)
    mean = sum((mean.sum(0) * length for mean, _, length in rows), torch.zeros(())) / max(count, 1)
    square = sum((s.sum(0) * length for _, s, length in rows), torch.zeros(())) / max(count, 1)
    return mean, square - mean**2, count


def expected(case: Case, world: int) -> list[dict[str, torch.Tensor]]:
    """What every process should have, from the formulas in float64 and autograd alone."""
    layer = case.layer(SSN).double()
    mean_running, var_running = layer.running_mean, layer.running_var
    for number in range(case.steps):
        pairs = case.batches(world, number)
        xs = [x.requires_grad_() for x, _ in pairs]
        mean, var, count = joined_moments(case, xs)
        momentum = layer.momentum if layer.momentum is not None else 1 / (number + 1)
        if layer.track_running_stats and count and needs_batch(case):
            unbiased = count / max(count - 1, 1) if layer.correction == 0 else 1
            mean_running = mean_running + momentum * (mean.detach() - mean_running)
            var_running = var_running + momentum * (var.detach() * unbiased - var_running)
    leaves = dict(layer.named_parameters())
    ratios = [
        one_hot(layer, name) if case.choice else sparsestmax(leaves[f'{name}_weight'], layer.radius)
        for name in ('mean', 'var')
    ]
    settings = (layer.normalizers, layer.num_groups, layer.correction, layer.eps, mean, var)
    ys = [
        reference.switchable_norm(x, *ratios, layer.weight, layer.bias, *settings)
        if x.numel()
        else x
        for x in xs
    ]
    loss = sum((y * dy).sum() for y, (_, dy) in zip(ys, pairs, strict=True))
    loss.backward()
    shared = {f'd{name}': leaf.grad for name, leaf in leaves.items()}
    if layer.track_running_stats:
        shared |= dict(running_mean=mean_running, running_var=var_running)
    dxs = [torch.zeros_like(x) if x.grad is None else x.grad for x in xs]
    return [dict(y=y.detach(), dx=dx) | shared for y, dx in zip(ys, dxs, strict=True)]


def needs_batch(case: Case) -> bool:
    return case.choice is None or 'BN' in case.choice


def one_hot(layer: SSN, name: str) -> torch.Tensor:
    chosen = layer.normalizers.index(layer.selected[name == 'var'])
    return nn.functional.one_hot(torch.tensor(chosen), len(layer.normalizers)).double()


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_equals_the_joined_batch(case, found):
    world = len(found)
    wanted = expected(case, world)
    results = [process[case.name]['tensors'] for process in found]
    upstream = sum(dy.square().sum() for _, dy in case.batches(world, case.steps - 1)).sqrt()
    for rank, names in enumerate(wanted):
        for name, value in names.items():
            if name not in results[rank]:
                assert name == 'dx'
                assert not case.needs_dx
                continue
            result = results[rank][name]
            dtype = case.dtype if name in ('y', 'dx') or not case.autocast else torch.float32
            assert result.dtype == dtype, name
            if name.startswith('d') and name != 'dx':
                # that of the joined batch is the sum of the processes' own
                result = sum(process[name].double() for process in results)
            if value is None:  # decided: constants in the formulas
                value = torch.zeros_like(result)
            error = (result.double() - value).norm()
            bound = TOLERANCE[dtype] * value.norm()
            if name.startswith('d'):
                bound += TOLERANCE[dtype] * upstream
            assert error <= bound + 1e-12, f'{name} of process {rank}: {error} > {bound}'


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_buffers_are_equal_to_the_bit(case, found):
    first, *others = [process[case.name]['tensors'] for process in found]
    names = [name for name, _ in case.layer().named_buffers()]
    for other in others:
        for name in names:
            assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_collectives(case, found):
    forward, backward = [2 * CHANNELS + 1], [2 * CHANNELS]
    if not needs_batch(case):
        forward = backward = []
    if case.name == 'no dx':
        backward = []
    for process in found:
        assert process[case.name]['collectives'] == forward + backward


@pytest.mark.parametrize('name', ['equal', 'unequal', 'correction', 'decided BN', 'cumulative'])
def test_equals_ssn_on_the_joined_batch(name, found):
    """The same by the layer itself."""
    (case,) = [case for case in CASES if case.name == name]
    layer = case.layer(SSN).double()
    for number in range(case.steps):
        pairs = case.batches(len(found), number)
        x, dy = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        x.requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
    results = [process[name]['tensors'] for process in found]
    for key, value in dict(y=y, dx=x.grad).items():
        result = torch.cat([result[key] for result in results]).double()
        assert (result - value).norm() <= 1e-5 * value.norm(), key
    for key, buffer in layer.named_buffers():
        torch.testing.assert_close(results[0][key].double(), buffer.double(), rtol=1e-5, atol=1e-6)


# One process


def test_without_a_process_group_it_is_ssn():
    case = Case('alone')
    (x, dy), *_ = case.batches(1, 0)
    results = []
    for kind in (SSN, SyncSSN):
        layer, leaf = case.layer(kind), x.float().requires_grad_()
        layer(leaf).backward(dy.float())
        results.append([leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def network() -> nn.Module:
    shared = SSN(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), shared, nn.Sequential(SSN2d(4, correction=1), nn.BatchNorm2d(4)), shared
    )


def test_conversion_and_back_keep_everything():
    model = network().double()
    set_radius(model, 1.0)
    model[2].eval()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    shown = str(model)
    called = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    converted = convert_sync_ssn(model)
    assert converted is model
    assert [type(m).__name__ for m in (model[1], model[2][0], model[2][1], model[3])] == [
        'SyncSSN',
        'SyncSSN',
        'BatchNorm2d',
        'SyncSSN',
    ]
    assert model[1] is model[3]
    assert model[1].process_group is None
    assert not model[2][0].training
    assert model[2][0].correction == 1
    assert model[1].selected == ('BN', 'BN')
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model(x)
    assert called == [1, 1]
    assert revert_sync_ssn(convert_sync_ssn(model)) is model
    assert type(model[1]) is type(model[2][0]) is SSN
    assert not hasattr(model[1], 'process_group')
    assert str(model) == shown.replace('SSN2d', 'SSN')
    for before, after in ((parameters, model.parameters()), (buffers, model.buffers())):
        assert all(a is b for a, b in zip(before, after, strict=True))


def test_the_root_itself_is_converted():
    layer = SSN(4)
    assert convert_sync_ssn(layer) is layer
    assert type(layer) is SyncSSN
    assert type(revert_sync_ssn(layer)) is SSN


def test_state_dicts_are_those_of_ssn():
    layer, synced = SSN(4), SyncSSN(4)
    assert list(layer.state_dict()) == list(synced.state_dict())
    set_radius(layer, 1.0)
    synced.load_state_dict(layer.state_dict())
    assert synced.selected == layer.selected


def test_copies_and_pickles():
    layer = SyncSSN(4)
    set_radius(layer, 1.0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is SyncSSN
        assert other.process_group is None
        assert other.selected == layer.selected


@pytest.mark.parametrize(
    'make', [lambda g: SyncSSN(4, process_group=g), lambda g: convert_sync_ssn(SSN(4), g)]
)
def test_what_is_no_group_is_refused(make):
    with pytest.raises(ValueError, match="process_group: got 'gloo', expected a ProcessGroup"):
        make('gloo')
