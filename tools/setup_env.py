#!/usr/bin/env python3
"""Create the virtual environment of this repository and install everything into it.

    python3 tools/setup_env.py                      # .venv, the maintained onedl packages
    python3 tools/setup_env.py --family original    # .venv-original, mmcv 2.1.0 and its torch, 2.1
    python3 tools/setup_env.py --family oldest      # .venv-oldest, the oldest without compiled ops
    python3 tools/setup_env.py --family pretrain    # .venv-pretrain, mmpretrain and torchvision

It may be stopped at any moment and run again; when nothing changed it returns within a second.
The versions are in requirements/*.txt. torch comes from the package index, which on Linux serves
the CUDA build (2.6 GB to download). For another one set SSN_TORCH to what pip should install:

    SSN_TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu' make setup

For the family pretrain it has to name torchvision too. The families original and oldest take it
only where it names torch==2.1.*, the torch that they are for.

Whoever has an environment with torch and mmcv already needs nothing of this:
activate it and run "pip install --no-build-isolation --no-deps -e .".
"""
# Standard library only. The syntax is that of Python 3.6, annotations included: an old interpreter
# must get as far as the line that says it is too old.

import argparse
import collections
import contextlib
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# Of a family:
# - its folder, and what that takes in GiB: (in itself, in the temporary folder); measured 5.5 and
#   2.6 with the CUDA build of torch, 6.0 with torchvision and mmpretrain;
# - the requirement file with its torch, the distribution that is its mmcv, and whether it needs
#   mmcv's ops;
# - the newest Python that all of it exists for;
# - requirement files beside those of the extras;
# - what has to be importable in the end, and the distributions that tell that an environment
#   belongs to another family.
Family = collections.namedtuple('Family', 'venv disk torch mmcv ops python also imports foreign')
FAMILIES = {
    'onedl': Family(
        '.venv',
        (6, 3),
        'torch',
        'onedl-mmcv',
        True,
        (3, 13),
        ['triton'],
        ['mmdet', 'mmseg'],
        ['mmengine'],
    ),
    'original': Family(
        '.venv-original',
        (6, 3),
        'torch2.1',
        'mmcv',
        True,
        (3, 11),
        [],
        ['mmdet', 'mmseg'],
        ['onedl_mmengine', 'mmcv_lite'],
    ),
    'oldest': Family(
        '.venv-oldest',
        (6, 3),
        'torch2.1',
        'mmcv-lite',
        False,
        (3, 11),
        [],
        ['mmengine'],
        ['onedl_mmengine', 'mmcv'],
    ),
    'pretrain': Family(
        '.venv-pretrain',
        (7, 3),
        'torchvision',
        'onedl-mmcv',
        False,
        (3, 13),
        [],
        ['mmpretrain', 'torchvision'],
        ['mmengine', 'onedl_mmdetection', 'onedl_mmsegmentation'],
    ),
}
DISK_CPU = (2, 1)  # measured 1.8 and 0.3 with the CPU build of torch

EXTRAS = ['demo', 'deploy', 'test', 'docs', 'dev']
OLDEST_PYTHON = (3, 10)
STAMP, LOCK = 'setup.stamp', 'setup.lock'

# mmcv installs without complaint when its ops were not compiled, or were compiled for another
# torch or without CUDA; only a call shows it.
OPS_CHECK = """
import mmcv.ops, torch
device = 'cuda' if torch.cuda.is_available() else 'cpu'
mmcv.ops.nms(torch.ones(1, 4, device=device), torch.ones(1, device=device), 0.5)
"""

UNREACHABLE = 'the package index cannot be reached; check the network or the proxy and run it again'
PIP_FAILURES = {  # what pip or the compiler prints: what it means
    'No space left on device': 'the disk is full',
    'Killed signal terminated program': 'a compiler ran out of memory; try MAX_JOBS=1',
    'Max retries exceeded': UNREACHABLE,
    'NewConnectionError': UNREACHABLE,
    'ConnectTimeoutError': UNREACHABLE,
    'Read timed out': UNREACHABLE,
    '(from versions: none)': UNREACHABLE,
}


class SetupError(Exception):
    """Something that the user has to mend, said in one line."""


def given_torch(family: str) -> list:
    """Return what SSN_TORCH asks of pip for this family, [] where it asks nothing.

    A family that is for torch 2.1 takes no other: the variable may be exported for .venv.
    """
    text = os.environ.get('SSN_TORCH', '')
    try:
        given = shlex.split(text)
    except ValueError as error:
        raise SetupError(
            f'SSN_TORCH is {text!r}, expected arguments of pip install: {error}'
        ) from None
    wanted = FAMILIES[family].torch
    if wanted == 'torchvision' and given and wanted not in text:
        raise SetupError(f'SSN_TORCH is {text!r}, expected {wanted} in it for --family {family}')
    return given if wanted != 'torch2.1' or 'torch==2.1.' in text else []


def torch_requirement(family: str) -> list:
    """Return the arguments that make pip install torch."""
    pinned = ROOT / 'requirements' / f'{FAMILIES[family].torch}.txt'
    return given_torch(family) or ['-r', str(pinned)]


def fingerprint(family: str, extras: list) -> str:
    """Hash everything that decides what is installed."""
    torch = torch_requirement(family)
    digest = hashlib.sha256(repr([str(ROOT), family, extras, torch]).encode())
    files = sorted((ROOT / 'requirements').glob('*.txt'))
    for path in [*files, ROOT / 'setup.py', Path(__file__).resolve()]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def run_python(venv: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the interpreter of the environment in silence and return what came of it."""
    command = [str(venv / 'bin' / 'python'), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, env=child_environment())
    except OSError as error:  # no such program: there is no environment, or half of one
        return subprocess.CompletedProcess(command, 1, '', str(error))


def is_current(venv: Path, family: str, wanted: str) -> bool:
    """Tell whether the environment was completed with this fingerprint and still works."""
    stamp = venv / STAMP
    if not stamp.is_file() or stamp.read_text() != wanted:
        return False
    names = ['mmcv', 'ssn_plugin', *FAMILIES[family].imports]
    probe = f'from importlib.util import find_spec; assert all(map(find_spec, {names}))'
    return run_python(venv, '-I', '-c', probe).returncode == 0


def python_version(venv: Path) -> tuple:
    """Return the version of the environment's Python, () where it does not start or has no pip."""
    probe = run_python(venv, '-c', 'import pip, sys; print(*sys.version_info[:2])')
    return tuple(int(number) for number in probe.stdout.split()) if probe.returncode == 0 else ()


def python_problems(version: tuple, whose: str, family: str) -> list:
    """Return what is wrong with an interpreter of this version."""
    newest = FAMILIES[family].python
    if OLDEST_PYTHON <= version <= newest:
        return []
    found, oldest, newest = ('.'.join(map(str, v)) for v in (version, OLDEST_PYTHON, newest))
    remedy = f'--family {family}; name another interpreter with "make setup PYTHON=..."'
    return [f'{whose} is Python {found}, expected {oldest} to {newest} for {remedy}']


def venv_problems(venv: Path, family: str) -> list:
    """Return what speaks against setting up this family in this folder."""
    if venv.exists() and not venv.is_dir():
        return [f'{venv} is a file, expected a folder']
    version = python_version(venv)
    if not version:
        found = [
            f'Python module {module} is missing: on Debian and Ubuntu "apt install python3-venv"'
            for module in ('venv', 'ensurepip')
            if not importlib.util.find_spec(module)
        ]
        if venv.is_dir() and not (venv / 'pyvenv.cfg').is_file():
            # an interrupted creation leaves some of these names and no pyvenv.cfg
            known = {'bin', 'include', 'lib', 'lib64', LOCK}
            if {path.name for path in venv.iterdir()} - known:
                found.append(f'{venv} is not a virtual environment: choose another --venv')
        return found
    for other in FAMILIES[family].foreign:
        if any(venv.glob(f'lib/python*/site-packages/{other}-*.dist-info')):
            return [f'{venv} holds another family ({other}): choose another --venv']
    return python_problems(version, f'{venv}/bin/python', family)


def build_problems() -> list:
    """Return what is missing to compile mmcv."""
    found = []
    compiler = os.environ.get('CXX', 'c++')
    if not shutil.which(compiler):
        found.append(f'no C++ compiler {compiler}: on Debian and Ubuntu "apt install g++"')
    header = Path(sysconfig.get_paths()['include'], 'Python.h')
    if not header.is_file():
        found.append(f'{header} is missing: on Debian and Ubuntu "apt install python3-dev"')
    sees_gpu = shutil.which('nvidia-smi') and os.environ.get('CUDA_VISIBLE_DEVICES') != ''
    if sees_gpu and not (shutil.which('nvcc') or os.environ.get('CUDA_HOME')):
        found.append(
            'no nvcc to compile mmcv for the GPU of this machine: install the CUDA toolkit '
            'that fits torch, or "export CUDA_VISIBLE_DEVICES=" to go without the GPU'
        )
    return found


def disk_problems(venv: Path, family: str) -> list:
    """Return the places with too little room for a fresh environment."""
    home = next(path for path in [venv, *venv.parents] if path.exists())
    on_cpu = any('cpu' in word for word in given_torch(family))
    needed = DISK_CPU if on_cpu else FAMILIES[family].disk
    places = dict(zip([home, Path(tempfile.gettempdir())], needed, strict=True))
    if len({place.stat().st_dev for place in places}) == 1:
        places = {home: sum(needed)}
    found = []
    for place, gib in places.items():
        free = shutil.disk_usage(place).free / 2**30
        if free < gib:
            found.append(f'{place} has {free:.1f} GiB of free disk, expected {gib} or more')
    return found


def check_machine(venv: Path, family: str) -> None:
    """Raise SetupError with all that is missing, before anything is written."""
    problems = venv_problems(venv, family)
    ops = FAMILIES[family].ops
    if not any(venv.glob('lib/python*/site-packages/mmcv/' + ('_ext*' if ops else 'ops'))):
        problems += (build_problems() if ops else []) + disk_problems(venv, family)
    if problems:
        raise SetupError('; '.join(problems))


@contextlib.contextmanager
def locked(venv: Path):
    """Hold the lock of the environment.

    The children inherit it: a pip that outlives a killed set-up makes the next one wait instead of
    meeting it in the same site-packages.
    """
    import fcntl  # not at the top: absent on Windows, which main() refuses in plain words

    venv.mkdir(parents=True, exist_ok=True)
    with (venv / LOCK).open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'another set-up of {venv} is at work: waiting for it', flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def child_environment() -> dict:
    """Return the variables that pip, the build of mmcv and the checks run with."""
    variables = dict(os.environ)
    variables.pop('PYTHONPATH', None)
    cores = os.cpu_count()
    memory_gib = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    variables.setdefault('MAX_JOBS', str(max(1, min(cores, int(memory_gib / 2)))))
    variables.update(
        CFLAGS=(variables.get('CFLAGS', '') + ' -g0').strip(),  # no debug symbols, a quicker build
        MMCV_WITH_OPS='1',  # the original mmcv compiles its ops only when asked
        PIP_DISABLE_PIP_VERSION_CHECK='1',
        PIP_REQUIRE_VIRTUALENV='1',
        PYTHONNOUSERSITE='1',
    )
    return variables


def explain(output: list) -> str:
    """Say in one line why pip failed, from the lines it printed."""
    for sign, meaning in PIP_FAILURES.items():
        if any(sign in line for line in output):
            return meaning
    lines = [line.strip() for line in output if line.strip()] or ['no message']
    errors = [line for line in lines if re.match(r'ERROR: |\w+Error: ', line)]
    return (errors or lines)[-1]


class Environment:
    """A virtual environment under construction."""

    def __init__(self, venv: Path, family: str, extras: list, lock):
        self.venv = venv
        self.family = family
        self.extras = extras
        self.lock = lock

    def build(self) -> None:
        """Carry out all steps; each is quick where its work is done already."""
        mmcv = (
            'compiling mmcv, 7 to 13 minutes on 2 cores the first time, less than one when its '
            'wheel is still there'
            if FAMILIES[self.family].ops
            else 'mmcv without ops'
        )
        steps = [
            (f'virtual environment {self.venv}', self.create),
            ('build tools', lambda: self.install('build')),
            ('torch: a minute or more, by the network', self.install_torch),
            (f'{self.family} packages: {mmcv}', self.install_family),
            (f'extras: {" ".join(self.extras)}', self.install_extras),
            ('ssn_plugin', self.install_project),
        ]
        for number, (title, step) in enumerate(steps, 1):
            print(f'== [{number}/{len(steps)}] {title}', flush=True)
            step()

    def create(self) -> None:
        """Make the environment, or complete the one there whose pip works."""
        if python_version(self.venv):
            for info in self.venv.glob('lib/python*/site-packages/*.dist-info'):
                # pip writes INSTALLER last: without it the package was interrupted half-way, and
                # pip would take it for installed
                if not (info / 'INSTALLER').is_file():
                    shutil.rmtree(info)
            return
        for path in self.venv.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        # not sys.executable: it may belong to the folder that has just been emptied
        base = getattr(sys, '_base_executable', sys.executable)
        made = subprocess.run(
            [base, '-m', 'venv', str(self.venv)],
            pass_fds=[self.lock.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if made.returncode:
            raise SetupError(f'python -m venv: {explain(made.stdout.splitlines())}')

    def pip(self, *arguments: str) -> None:
        """Run pip, showing what it prints."""
        process = subprocess.Popen(
            [str(self.venv / 'bin' / 'python'), '-m', 'pip', *arguments],
            cwd=ROOT,
            env=child_environment(),
            pass_fds=[self.lock.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        last_lines = collections.deque(maxlen=500)
        with process:
            for line in process.stderr:
                sys.stderr.write(line)
                last_lines.append(line)
        if process.returncode:
            raise SetupError(f'pip {arguments[0]}: {explain(list(last_lines))}')

    def install(self, *names: str, options: tuple = ()) -> None:
        """Install what the requirement files of these names list."""
        files = [word for name in names for word in ('-r', f'requirements/{name}.txt')]
        self.pip('install', *options, *files)

    def install_torch(self) -> None:
        """Install torch, before mmcv because mmcv is compiled against it."""
        self.pip('install', *torch_requirement(self.family))

    def install_family(self) -> None:
        """Install the framework, mmcv with its ops where they are needed."""
        pins = ['-r', str(ROOT / 'requirements' / f'{self.family}.txt')]
        mmcv = self.mmcv()
        if not FAMILIES[self.family].ops:
            # An isolated build sees no torch, so it compiles none. pip must not keep the result,
            # or give what it has kept: a build for the torch of another family.
            self.pip('install', '--no-cache-dir', '--no-deps', mmcv)
            self.pip('install', *pins)
            return
        wheels = self.wheels()
        if not any(wheels.glob('*.whl')):
            self.compile_mmcv(wheels)
        self.pip('install', '--no-build-isolation', '--find-links', str(wheels), *pins)
        if run_python(self.venv, '-c', OPS_CHECK).returncode == 0:
            return
        print('mmcv has no ops that work: compiling it again, 7 to 13 minutes', flush=True)
        with contextlib.suppress(SetupError):  # pip calls it an error when it has kept nothing
            self.pip('cache', 'remove', FAMILIES[self.family].mmcv.replace('-', '_'))
        self.compile_mmcv(wheels)
        wheel = str(next(wheels.glob('*.whl')))
        self.pip('install', '--no-deps', '--force-reinstall', wheel)
        self.check(OPS_CHECK)

    def mmcv(self) -> str:
        """Return what pip calls this family's mmcv, with its version."""
        lines = (ROOT / 'requirements' / f'{self.family}.txt').read_text().splitlines()
        name = FAMILIES[self.family].mmcv
        return next(line for line in lines if line.startswith(name)).split()[0]

    def wheels(self) -> Path:
        """Return the folder, beside the environment, that holds mmcv compiled for this torch."""
        code = 'import sys, torch; print(torch.__version__, "py%d%d" % sys.version_info[:2])'
        key = run_python(self.venv, '-c', code).stdout.split()
        return self.venv.parent / '.venv-wheels' / '-'.join([self.mmcv().replace('==', '-'), *key])

    def compile_mmcv(self, wheels: Path) -> None:
        """Compile mmcv and keep the wheel; its folder appears only when that is whole."""
        unfinished = wheels.with_name(f'{wheels.name}.unfinished')
        for folder in (unfinished, wheels):
            shutil.rmtree(folder, ignore_errors=True)
        wanted = ['--no-build-isolation', '--no-deps', '--wheel-dir', str(unfinished)]
        self.pip('wheel', *wanted, self.mmcv())
        unfinished.rename(wheels)

    def install_extras(self) -> None:
        """Install what the extras list, at versions that suit the family's own pins."""
        names = [*self.extras, *FAMILIES[self.family].also]
        self.install(*names, options=('-c', f'requirements/{self.family}.txt'))

    def install_project(self) -> None:
        """Install this repository so that its files are used in place."""
        self.pip('install', '--no-build-isolation', '--no-deps', '-e', '.')
        self.check(f'import {", ".join(FAMILIES[self.family].imports)}')

    def check(self, code: str) -> None:
        """Raise SetupError with the last line of the traceback if the code fails."""
        result = run_python(self.venv, '-c', code)
        if result.returncode:
            reason = result.stderr.strip().splitlines()[-1]
            raise SetupError(f'the {self.family} packages do not work: {reason}')


def set_up(venv: Path, family: str, extras: list) -> None:
    """Bring the environment to the state that the requirement files describe."""
    started = time.time()
    wanted = fingerprint(family, extras)
    if is_current(venv, family, wanted):
        print(f'{venv} is up to date')
        return
    check_machine(venv, family)
    with locked(venv) as lock:
        if not is_current(venv, family, wanted):  # it is where the holder of the lock did the work
            (venv / STAMP).unlink(missing_ok=True)
            Environment(venv, family, extras, lock).build()
            (venv / STAMP).write_text(wanted)
    print(f'{venv} is ready after {time.time() - started:.0f} s')


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--venv', type=Path, help='folder of the environment')
    parser.add_argument('--family', choices=sorted(FAMILIES), default='onedl')
    parser.add_argument('--extras', nargs='+', choices=EXTRAS, default=EXTRAS)
    args = parser.parse_args()
    try:
        problems = python_problems(sys.version_info[:2], sys.executable, args.family)
        if os.name != 'posix':
            problems = ['Windows is not supported: use its subsystem for Linux']
        if problems:
            raise SetupError('; '.join(problems))
        venv = args.venv or ROOT / FAMILIES[args.family].venv
        set_up(venv.absolute(), args.family, args.extras)
    except (SetupError, OSError) as error:
        print(f'setup_env: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('setup_env: interrupted; run it again to go on', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
