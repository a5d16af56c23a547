"""Compile the kernels for GPUs that need not be there; run by test_triton.py.

python tests/test_ops/compile_kernels.py variants       # everything a layer can launch, types alone
python tests/test_ops/compile_kernels.py machine 80 90  # a sample down to machine code, registers

Records the launches of calls on memory that nobody reads, and compiles each as a launch would. It
needs a process of its own, in which Triton compiles instead of interpreting.
"""

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from ssn_plugin.ops.switchable_norm.triton import direct
from ssn_plugin.ops.switchable_norm.triton import launch as backend

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))
from shapes import SHAPES

POINTERS = {
    torch.float32: '*fp32',
    torch.float16: '*fp16',
    torch.bfloat16: '*bf16',
    torch.float64: '*fp64',
    torch.int64: '*i64',
}
THREE, FOUR = ('IN', 'LN', 'BN'), ('GN', 'BN', 'LN', 'IN')
GRADIENTS = ('needs_dx', 'needs_control', 'needs_dbias', 'needs_dweight')
launches: list[tuple] = []


def record() -> None:
    """Let the backend note its launches from now on; nothing runs."""

    def note(passes, tensors, number, kinds):
        for launch in passes:
            kernel = getattr(direct.kernels(), launch.name)
            launches.append((kernel, *launch.arguments((*tensors, number))))

    direct.run = note


def call(
    shape, dtype=torch.float32, last=False, normalizers=THREE, ratio_map='sparsestmax',
    training=True, selected=(None, None), affine=(True, True), tracked=True, momentum=0.1,
    correction=0, parameters=torch.float32, wanted=((True,) * 4,),
) -> None:  # fmt: skip
    """Forward, and backward for every combination of wanted gradients."""
    x = torch.empty(shape, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    index = torch.tensor(0)
    state = (torch.empty(()), index, index, index, index)
    if ratio_map != 'sparsestmax':
        state = (None,) * 5
    control = torch.empty(2, len(normalizers), dtype=parameters)
    if None not in selected:
        control, state = (None, None), (None,) * 5
    vectors = [torch.empty(shape[1], dtype=parameters) for _ in range(4)]
    weight, bias = (v if keep else None for v, keep in zip(vectors, affine, strict=False))
    running = vectors[2:] if tracked and 'BN' in normalizers else (None, None)
    settings = (normalizers, 2, correction, 1e-5, selected)
    _, saved, _ = backend.forward(
        x, *control, ratio_map, *state, weight, bias, *running, momentum, training, *settings
    )
    constant = not training and running[0] is not None
    for combination in wanted:
        names = dict(zip(GRADIENTS, combination, strict=True))
        backend.backward(x, x, saved, weight, ratio_map, constant, *settings, **names)


def every_call() -> Iterator[dict]:
    """Arguments of :func:`call` that reach whatever a layer can launch.

    What chooses a layout or the dtype of x, and what chooses statistics and gradients, meet in
    different arguments of the kernels: each is crossed with all of its own kind.
    """
    gradients = list(itertools.product((True, False), repeat=4))
    for shape, dtype, last, training in itertools.product(
        ((2, 6, 40, 50), (1366, 6, 7, 7), (2, 8, 8, 8), (1, 2, 300, 300), (4, 6, 1, 1)),
        (torch.float32, torch.float16, torch.bfloat16),
        (False, True),
        (True, False),
    ):
        for selected in ((None, None), (0, 0), (2, 2)):
            wanted = ((True,) * 4, (False, True, True, True))
            yield dict(
                shape=shape, dtype=dtype, last=last, training=training, selected=selected,
                wanted=wanted,
            )  # fmt: skip
    names = [THREE, FOUR, ('IN', 'LN'), ('LN', 'BN'), ('IN', 'BN'), ('GN', 'BN'), ('IN', 'GN')]
    for normalizers, ratio_map, training, tracked in itertools.product(
        names, ('sparsestmax', 'softmax', 'given'), (True, False), (True, False)
    ):
        choices = [(None, None)]
        if ratio_map == 'sparsestmax':
            known = (None, *range(len(normalizers)))
            choices = list(itertools.product(known, known))
        for selected in choices:
            yield dict(
                shape=(2, 4, 5, 5), normalizers=normalizers, ratio_map=ratio_map,
                training=training, tracked=tracked, selected=selected,
            )  # fmt: skip
    for selected, affine, training, correction, wanted in itertools.product(
        ((None, None), (0, 0), (1, 1), (2, 2), (1, 2), (None, 1)),
        itertools.product((True, False), repeat=2),
        (True, False),
        (0, 1),
        (gradients,),
    ):
        yield dict(
            shape=(2, 4, 5, 5), selected=selected, affine=affine, training=training,
            correction=correction, wanted=wanted,
        )  # fmt: skip
    for momentum, parameters in itertools.product(
        (0.1, 1, torch.empty(())), (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    ):
        yield dict(shape=(2, 4, 5, 5), momentum=momentum, parameters=parameters)


def specialised(kernel, args, kwargs) -> tuple[dict, dict, dict, dict]:
    """Signature, constants, attributes and options of a launch, as the launcher finds them."""
    values = dict(zip(kernel.arg_names, args)) | kwargs  # noqa: B905  (the rest are in kwargs)
    options = {name: values.pop(name) for name in ('num_warps', 'num_stages') if name in values}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = 'i64' if isinstance(value, int) and value >= 2**31 else 'i32'
        if parameter.is_constexpr or value is None:
            kind, constants[(place,)] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            kind = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(place,)] = [['tt.divisibility', 16]]
        elif isinstance(value, float):
            kind = 'fp32'
        signature[parameter.name] = kind
    return signature, constants, attributes, options


def front_end(kernel, signature, constants, attributes, options) -> None:
    """Triton's own types and shapes: what the interpreter does not look at."""
    target = GPUTarget('cuda', 90, 32)
    compiler = make_backend(target)
    settings = compiler.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    source.make_ir(
        target,
        settings,
        compiler.get_codegen_implementation(settings),
        compiler.get_module_map(),
        context,
    )


def variants() -> None:
    """The front end over everything a layer can launch, each variant once."""
    record()
    seen: dict[str, int] = {}
    done = set()
    failed = 0
    for arguments in every_call():
        launches.clear()
        call(**arguments)
        for kernel, args, kwargs in launches:
            signature, constants, attributes, options = specialised(kernel, args, kwargs)
            # Alignment is an attribute, which changes no type.
            key = (kernel, *signature.items(), *constants.items(), *options.items())
            if key in done:
                continue
            done.add(key)
            name = kernel.fn.__name__
            seen[name] = seen.get(name, 0) + 1
            try:
                front_end(kernel, signature, constants, attributes, options)
            except Exception as error:
                failed += 1
                lines = str(error).strip().splitlines()
                print(f'{name} {arguments}: {type(error).__name__}: {lines[-1:]}', flush=True)
    print(' '.join(f'{name}={count}' for name, count in sorted(seen.items())))
    print(f'{sum(seen.values())} variants, {failed} failed')
    sys.exit(1 if failed else 0)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of it that did not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, '--dump-resource-usage', file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = (int(found.split(f'{word}:')[1].split()[0]) for word in ('REG', 'STACK'))
    return registers, stack


def sample() -> Iterator[dict]:
    """Arguments of :func:`call`: the inputs of the benchmark, and one of every other kind."""
    for shape in SHAPES:
        yield dict(shape=shape.size)
    large = (2, 64, 200, 336)
    for dtype in (torch.bfloat16, torch.float16):
        for shape in (large, (2, 2048, 25, 42), (256, 256, 14, 14)):
            yield dict(shape=shape, dtype=dtype)
    for shape in (large, (2, 256, 50, 84), (32, 512, 7, 7)):
        yield dict(shape=shape, last=True)
        yield dict(shape=shape, dtype=torch.bfloat16, last=True)
    yield dict(shape=(2, 512, 25, 42), ratio_map='softmax', training=False)
    yield dict(
        shape=(512, 256, 7, 7), normalizers=FOUR, ratio_map='given', momentum=torch.empty(())
    )
    for k in range(3):
        yield dict(shape=large, selected=(k, k))
        yield dict(shape=large, selected=(k, k), training=False)
    for shape in ((2, 64, 128, 128), (2, 64, 127, 127), (512, 256, 7, 7)):
        yield dict(shape=shape, selected=(0, 0))
    yield dict(shape=(32, 256, 14, 14), selected=(0, 0), last=True)
    yield dict(shape=(32, 512, 7, 7), selected=(0, 0), last=True, dtype=torch.float16)


def machine(generations: tuple[int, ...]) -> None:
    """A line per kernel of :func:`sample`, compiled down to machine code.

    Inputs take turns: one is for the first generation, the next for the second, in half the time.
    """
    record()
    done = set()
    for arguments, generation in zip(sample(), itertools.cycle(generations)):
        launches.clear()
        call(**arguments)
        for kernel, args, kwargs in launches:
            signature, constants, attributes, options = specialised(kernel, args, kwargs)
            key = (generation, kernel, *signature.items(), *constants.items(), *options.items())
            if key in done:
                continue
            done.add(key)
            source = ASTSource(
                fn=kernel, signature=signature, constexprs=constants, attrs=attributes
            )
            target = GPUTarget('cuda', generation, 32)
            compiled = triton.compile(source, target=target, options=options)
            registers, spilled = resources(compiled.asm['cubin'])
            print(
                f'{kernel.fn.__name__} sm_{generation} {arguments}: {registers} registers, '
                f'{spilled} bytes spilled',
                flush=True,
            )


if __name__ == '__main__':
    if sys.argv[1] == 'variants':
        variants()
    else:
        machine(tuple(int(number) for number in sys.argv[2:]))
