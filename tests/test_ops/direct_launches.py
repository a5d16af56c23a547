"""Direct launches beside Triton's own call, of the same inputs, on a driver that runs nothing.

test_triton.py runs these tests in a process of their own, in which Triton does not interpret. What
is compiled is only noted: a launch has to reach a kernel that was compiled for just these types,
constants and alignments, with the arguments that Triton's own call would give it.
"""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher

from ssn_plugin.ops.switchable_norm.triton import direct
from ssn_plugin.ops.switchable_norm.triton import launch as backend

pytestmark = pytest.mark.skipif(not direct._is_known(), reason='launched by the ordinary call here')
THREE, FOUR = ('IN', 'LN', 'BN'), ('GN', 'BN', 'LN', 'IN')
WANTED = ('needs_dx', 'needs_control', 'needs_dbias', 'needs_dweight')
launched: list[tuple] = []


class Compiled:
    """Stands for a compiled kernel: notes what was compiled, and what it is called with."""

    def __init__(self, source, target=None, options=None, **kwargs):
        self.what = (
            source.fn.fn.__name__,
            tuple(source.signature.items()),
            str(source.constants),
            str(source.attrs),
            options['num_warps'],
        )
        self.kinds = list(source.signature.values())
        self.function, self.packed_metadata = id(self), (options['num_warps'], 1, 0)
        Compiled.made += 1

    made = 0

    def launch_metadata(self, *args):
        return None

    def run(self, first, second, third, stream, function, packed, metadata, enter, leave, *args):
        assert (second, third, function, packed) == (1, 1, self.function, self.packed_metadata)
        kinds = self.kinds
        assert len(args) == len(kinds)
        values = [
            value.data_ptr() if isinstance(value, torch.Tensor) else value
            for value, kind in zip(args, kinds, strict=True)
            if kind != 'constexpr'
        ]
        for hook in (enter, leave):
            for call in getattr(hook, 'calls', [hook] if hook else []):
                call(metadata)
        launched.append((self.what, first, stream, values))


class Driver:
    """A driver without a device; streams and devices are numbers that tests set."""

    device, stream = 0, 7
    launcher_cls = None

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 100 * max(device, 0) + self.stream  # tensors are on the CPU, -1

    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)


def caches_of(kernel) -> dict:
    """What Triton compiled, by device; before 3.3 under another name."""
    return kernel.device_caches if hasattr(kernel, 'device_caches') else kernel.cache


@pytest.fixture(autouse=True)
def stubbed(monkeypatch):
    """The driver; memory that the same call gets again, and a way to do without direct launches."""
    driver, made = Driver(), []
    triton.runtime.driver.set_active(driver)
    monkeypatch.setattr(triton.compiler, 'compile', Compiled)
    used = itertools.count()

    def again(tensor):
        place = next(used)
        if place == len(made):
            made.append(tensor)
        assert made[place].shape == tensor.shape
        return made[place]

    vector, image = backend._vector, backend._image
    monkeypatch.setattr(backend, '_vector', lambda size, like: again(vector(size, like)))
    monkeypatch.setattr(backend, '_image', lambda x: again(image(x)))
    launched.clear()
    for cached in (direct._is_direct, backend._forward_pass, backend._backward_pass):
        cached.cache_clear()
    for kernel in map(direct.kernels().__dict__.get, direct.kernels().__all__):
        caches_of(kernel).clear()

    def compare(call) -> None:
        nonlocal used
        found = []
        for ordinary in (False, True):
            used = itertools.count()
            launched.clear()
            with monkeypatch.context() as patch:
                if ordinary:
                    patch.setattr(direct, '_is_watched', lambda: True)
                call()
            found.append(list(launched))
        made.clear()
        used = itertools.count()
        for direct_launch, ordinary_launch in zip(*found, strict=True):
            assert direct_launch == ordinary_launch
        assert found[0]

    return SimpleNamespace(driver=driver, compare=compare)


def placed(size, dtype, shift) -> torch.Tensor:
    """A vector whose address 16 divides, or does not."""
    return torch.zeros(size + 16, dtype=dtype)[shift : shift + size]


def call(
    shape=(2, 8, 16, 16), dtype=torch.float32, last=False, normalizers=THREE, selected=(None, None),
    ratio_map='sparsestmax', training=True, affine=(True, True), momentum=0.1,
    parameters=torch.float32, shifts=(0,) * 8, eps=1e-5, wanted=(True,) * 4,
):  # fmt: skip
    """A forward and a backward pass, to be repeated with the same memory."""
    x = torch.zeros(shape, dtype=dtype)
    x = placed(x.numel(), dtype, shifts[0]).view(shape)
    if last:
        x = x.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    vectors = [placed(shape[1], parameters, shift) for shift in shifts[1:5]]
    weight, bias = (v if keep else None for v, keep in zip(vectors, affine, strict=False))
    control = [placed(len(normalizers), parameters, shift) for shift in shifts[5:7]]
    index = torch.tensor(0)
    state = (torch.zeros(()), index, index, index, index)
    if ratio_map != 'sparsestmax' or None not in selected:
        state = (None,) * 5
    if None not in selected:
        control = (None, None)
    dy = placed(x.numel(), dtype, shifts[7]).view(shape)
    if last:
        dy = dy.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    settings = (normalizers, 2, 0, eps, selected)

    def both():
        _, saved, _ = backend.forward(
            x, *control, ratio_map, *state, weight, bias, *vectors[2:], momentum, training,
            *settings,
        )  # fmt: skip
        names = dict(zip(WANTED, wanted, strict=True))
        backend.backward(dy, x, saved, weight, ratio_map, not training, *settings, **names)

    return both


def test_a_direct_launch_is_what_triton_would_launch(stubbed):
    draw = random.Random(0)
    shapes = [(2, 6, 8, 8), (2, 8, 16, 16), (3, 6, 7, 7), (1, 16, 1, 1), (1, 2, 300, 300)]
    for _ in range(80):
        ratio_map = draw.choice(('sparsestmax', 'softmax', 'given'))
        choices = (None, None, 0, 1, 2) if ratio_map == 'sparsestmax' else (None,)
        both = call(
            shape=draw.choice(shapes),
            dtype=draw.choice((torch.float32, torch.bfloat16, torch.float16)),
            last=draw.random() < 0.3,
            normalizers=draw.choice((THREE, FOUR)),
            selected=(draw.choice(choices), draw.choice(choices)),
            ratio_map=ratio_map,
            training=draw.random() < 0.7,
            affine=draw.choice(((True, True), (True, True), (False, False), (True, False))),
            momentum=draw.choice((0.1, 1, 0.25, torch.zeros(()))),
            parameters=draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64)),
            shifts=draw.choice(((0,) * 8, tuple(draw.choice((0, 1, 8)) for _ in range(8)))),
            eps=draw.choice((1e-5, 0.1)),
            wanted=draw.choice(((True,) * 4, tuple(draw.random() < 0.7 for _ in range(4)))),
        )
        both()  # compiles; the next one is direct
        stubbed.compare(both)


def test_a_kernel_is_searched_for_once(stubbed, monkeypatch):
    searched = []
    ordinary = direct.Launch.ordinary
    monkeypatch.setattr(
        direct.Launch, 'ordinary', lambda self, values: searched.append(1) or ordinary(self, values)
    )
    both = call()
    for _ in range(3):
        both()
    assert len(searched) == 4


@pytest.mark.parametrize('memory', [0, 64])
def test_what_the_launcher_passes_on_is_the_same_without_it(memory):
    passed, given = [], (1, 2.5, True)
    launcher = object.__new__(CudaLauncher)
    launcher.launch = lambda *values: passed.append(values)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, False
    launcher.global_scratch_size, launcher.profile_scratch_size = memory, 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    launcher.gsan_enabled, launcher.arg_annotations, launcher.kernel_signature = False, [1], b'2'
    settled = (11, (2, 1, 0), None, None, None)
    start, between, packs = direct.innermost(launcher, settled, 2, given)
    assert not passed  # nothing was launched
    assert (start is launcher) == bool(memory)  # one that needs memory goes the long way
    if not memory:
        launcher(5, 1, 1, 7, *settled, 32, 48, *given)
        start(5, 1, 1, 7, *between, *([(32, 48, *given)] if packs else (32, 48, *given)))
        assert passed[0] == passed[1]


def test_the_momentum_of_a_call_is_its_own(stubbed):
    for momentum in (0.1, 0.5):
        launched.clear()
        call(momentum=momentum)()
        assert any(momentum in values for *_, values in launched)


def test_the_current_stream_counts(stubbed):
    both = call()
    both()
    for stubbed.driver.stream in (3, 4):
        launched.clear()
        both()
        assert {stream for _, _, stream, _ in launched} == {stubbed.driver.stream}


def test_every_device_has_its_kernels(stubbed, monkeypatch):
    # A device is entered if it is not the current one, and its stream is taken.
    entered = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            self.before, stubbed.driver.device = stubbed.driver.device, self.index

        def __exit__(self, *_):
            stubbed.driver.device = self.before

    monkeypatch.setattr(torch.cuda, 'current_device', lambda: stubbed.driver.device)
    monkeypatch.setattr(torch.cuda, 'device', Device)
    launches = backend._forward_pass(
        (2, 6, 64, 1, 0, THREE, 2, False, (0, 0)), 'sparsestmax', False, False, False, 1e-5
    ).launches
    tensors = tuple(placed(2048, torch.float32, 0) for _ in range(5)) + (None,) * 13
    for device in (0, 1, 1, 0):
        launched.clear()
        direct.run(launches, tensors, 0.0, (device, torch.float32))
        assert {stream for _, _, stream, _ in launched} == {100 * device + 7}
    assert entered == [1, 1]
    assert all(len(launch.compiled) == 2 for launch in launches)
    kernels = [{id(found[-1]) for found in launch.compiled.values()} for launch in launches]
    assert all(len(of_devices) == 2 for of_devices in kernels)


def test_a_profiler_sees_every_launch(stubbed):
    both = call()
    both()
    seen = []
    if not hasattr(triton, 'knobs'):
        pytest.skip('hooks were attributes of a class before Triton 3.4')
    hook, before = triton.knobs.runtime.launch_enter_hook, None
    if hasattr(hook, 'add'):
        hook.add(seen.append)
    else:
        before, triton.knobs.runtime.launch_enter_hook = hook, seen.append
    try:
        both()
    finally:
        if hasattr(hook, 'add'):
            hook.remove(seen.append)
        else:
            triton.knobs.runtime.launch_enter_hook = before
    assert len(seen) == 4
    both()
    assert len(seen) == 4


def test_a_hook_of_a_kernel_sees_every_launch(stubbed):
    both = call()
    both()
    seen, kernel = [], direct.kernels().ssn_fwd_apply_kernel
    kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
    try:
        both()
        both()
    finally:
        kernel.pre_run_hooks.clear()
    assert len(seen) == 2
    both()
    assert len(seen) == 2


def test_what_fails_inside_a_capture_names_the_remedy(stubbed, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)

    def fail(*args, **kwargs):
        raise RuntimeError('operation not permitted when stream is capturing')

    both = call()
    both()
    both()  # what is compiled may be captured
    monkeypatch.setattr(triton.compiler, 'compile', fail)
    for kernel in map(direct.kernels().__dict__.get, direct.kernels().__all__):
        caches_of(kernel).clear()
        if hasattr(kernel, 'compile'):  # before Triton 3.3
            monkeypatch.setattr(kernel, 'compile', fail)
    with pytest.raises(RuntimeError, match='forward and backward pass on it before') as caught:
        call(shape=(1, 2, 300, 300))()
    assert 'not permitted' in str(caught.value.__cause__)


def test_an_unknown_version_gets_the_ordinary_call(stubbed, monkeypatch):
    monkeypatch.setattr(direct, '_triton_version', lambda: (4, 0))
    direct._is_direct.cache_clear()
    assert not direct._is_direct()
    launched.clear()
    both = call()
    both()
    both()
    assert len(launched) == 8
