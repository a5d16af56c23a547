"""tools/setup_env.py: its stamp, its lock, and what it says when something is missing.

Only environments without packages are created here; that pip and mmcv arrive is what the
environment running these tests shows.
"""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'tools' / 'setup_env.py'


@pytest.fixture
def setup_env():
    spec = importlib.util.spec_from_file_location('setup_env', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    """The files that the script reads, in a place of their own."""
    root = tmp_path / 'checkout'
    shutil.copytree(ROOT / 'requirements', root / 'requirements')
    (root / 'tools').mkdir()
    shutil.copy(SCRIPT, root / 'tools')
    shutil.copy(ROOT / 'setup.py', root)
    return root


def run(script, *arguments, **variables):
    return subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def assert_refused(result, *expected):
    """The script must have ended with one line that says what is the matter."""
    assert result.returncode == 1
    assert result.stderr.startswith('setup_env: ')
    assert result.stderr.count('\n') == 1
    for words in expected:
        assert words in result.stderr


def make_venv(folder, pip='__version__ = "23"'):
    """An environment whose pip is a stub: enough for the questions asked before installing."""
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    site_packages = next(folder.glob('lib/python*/site-packages'))
    (site_packages / 'pip.py').write_text(pip)
    return site_packages


# ---- before anything is written


def test_old_interpreters_can_read_the_script():
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    annotations = [
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in [function.returns, *(argument.annotation for argument in function.args.args)]
        if node is not None
    ]
    # list[str] or str | None would fail there as soon as the function is defined
    assert not any(isinstance(node, (ast.Subscript, ast.BinOp)) for node in annotations)


@pytest.mark.parametrize(
    ('version', 'family', 'newest'),
    [(8, 'onedl', 13), (9, 'onedl', 13), (14, 'onedl', 13), (12, 'original', 11)],
)
def test_python_of_the_wrong_version_is_refused(setup_env, version, family, newest):
    [problem] = setup_env.python_problems((3, version), '/usr/bin/python3', family)
    assert f'/usr/bin/python3 is Python 3.{version}, expected 3.10 to 3.{newest}' in problem
    assert f'--family {family}' in problem
    assert 'PYTHON=' in problem


@pytest.mark.parametrize(
    ('version', 'family'), [(10, 'onedl'), (13, 'onedl'), (10, 'original'), (11, 'oldest')]
)
def test_supported_python_is_accepted(setup_env, version, family):
    assert setup_env.python_problems((3, version), 'python', family) == []


def test_missing_compiler_is_named_and_nothing_is_written(tmp_path):
    result = run(SCRIPT, '--venv', tmp_path / 'venv', PATH=str(tmp_path), CXX='c++')
    assert_refused(result, 'no C++ compiler c++', 'apt install g++')
    assert not (tmp_path / 'venv').exists()


def test_missing_header_is_named(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env.sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    assert any(f'{tmp_path}/Python.h is missing' in line for line in setup_env.build_problems())


def test_missing_venv_module_is_named(setup_env, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        setup_env.importlib.util, 'find_spec', lambda name: name != 'ensurepip' and find(name)
    )
    [problem] = setup_env.venv_problems(tmp_path / 'venv', 'onedl')
    assert problem.startswith('Python module ensurepip is missing')


def test_gpu_without_nvcc_is_refused_unless_hidden(setup_env, monkeypatch, tmp_path):
    for name in ('nvidia-smi', 'c++'):
        (tmp_path / name).write_text('')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setenv('CXX', 'c++')
    monkeypatch.delenv('CUDA_HOME', raising=False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert any('no nvcc' in problem for problem in setup_env.build_problems())
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert not any('no nvcc' in problem for problem in setup_env.build_problems())


def test_full_disk_is_refused(setup_env, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=2.5 * 2**30)
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: usage)
    monkeypatch.setattr(setup_env.tempfile, 'gettempdir', lambda: str(tmp_path))
    monkeypatch.delenv('SSN_TORCH', raising=False)
    [problem] = setup_env.disk_problems(tmp_path / 'not' / 'there' / 'yet', 'onedl')
    assert problem == f'{tmp_path} has 2.5 GiB of free disk, expected 9 or more'
    monkeypatch.setenv('SSN_TORCH', 'torch --index-url https://download.pytorch.org/whl/cpu')
    assert 'expected 3 or more' in setup_env.disk_problems(tmp_path, 'onedl')[0]


def test_all_problems_are_told_at_once(tmp_path, setup_env, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: usage)
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(setup_env.SetupError, match=r'no-such-compiler.*; .*free disk'):
        setup_env.check_machine(tmp_path / 'venv', 'onedl')


def test_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / 'thesis.tex').write_text('x')
    assert_refused(run(SCRIPT, '--venv', tmp_path), 'is not a virtual environment')
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


@pytest.mark.parametrize(
    ('held', 'asked'),
    [
        ('onedl_mmengine-0.10.12', 'original'),
        ('mmengine-0.10.7', 'onedl'),
        ('mmengine-0.10.7', 'pretrain'),
        ('onedl_mmengine-0.10.12', 'oldest'),
        ('mmcv-2.1.0', 'oldest'),
        ('mmcv_lite-2.1.0', 'original'),
        ('onedl_mmdetection-3.5.1', 'pretrain'),
    ],
)
def test_families_are_not_mixed(tmp_path, held, asked):
    (make_venv(tmp_path / 'venv') / f'{held}.dist-info').mkdir()
    result = run(SCRIPT, '--venv', tmp_path / 'venv', '--family', asked)
    assert_refused(result, 'holds another family', held.split('-')[0])


def test_unbalanced_quotes_in_ssn_torch(tmp_path):
    result = run(SCRIPT, '--venv', tmp_path / 'venv', SSN_TORCH="torch '")
    assert_refused(result, 'SSN_TORCH', 'expected arguments of pip install')


def test_torch_without_torchvision_is_refused_for_pretraining(tmp_path, setup_env, monkeypatch):
    arguments = ['--venv', tmp_path / 'venv', '--family', 'pretrain']
    result = run(SCRIPT, *arguments, SSN_TORCH='torch==2.14.1')
    assert_refused(result, "SSN_TORCH is 'torch==2.14.1'", 'expected torchvision in it')
    assert not (tmp_path / 'venv').exists()
    monkeypatch.setenv('SSN_TORCH', 'torch==2.14.1 torchvision==0.29.1')
    assert setup_env.torch_requirement('pretrain') == ['torch==2.14.1', 'torchvision==0.29.1']


@pytest.mark.parametrize('family', ['original', 'oldest'])
def test_torch_of_another_environment_does_not_replace_the_oldest(
    tmp_path, setup_env, monkeypatch, family
):
    """SSN_TORCH may be exported for .venv."""
    monkeypatch.delenv('SSN_TORCH', raising=False)
    pinned = setup_env.torch_requirement(family)
    unset = setup_env.fingerprint(family, [])
    monkeypatch.setenv('SSN_TORCH', 'torch==2.13.0 --index-url https://example.org/whl/cpu')
    assert setup_env.torch_requirement(family) == pinned
    assert setup_env.fingerprint(family, []) == unset
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: usage)
    [problem] = setup_env.disk_problems(tmp_path, family)
    assert 'expected 9 or more' in problem  # with CUDA
    monkeypatch.setenv('SSN_TORCH', 'torch==2.1.2+cpu')
    assert setup_env.torch_requirement(family) == ['torch==2.1.2+cpu']


def test_pretraining_needs_no_compiler(tmp_path, setup_env, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    setup_env.check_machine(tmp_path / 'venv', 'pretrain')
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(setup_env.SetupError, match='free disk'):
        setup_env.check_machine(tmp_path / 'venv', 'pretrain')


# ---- the stamp


@pytest.fixture
def complete(setup_env, tmp_path):
    """An environment that looks complete, with what counts to be found in it."""
    site_packages = make_venv(tmp_path / 'venv')
    for name in ('mmcv', 'mmdet', 'mmseg', 'ssn_plugin'):
        (site_packages / f'{name}.py').write_text('')
    (tmp_path / 'venv' / setup_env.STAMP).write_text(
        setup_env.fingerprint('onedl', setup_env.EXTRAS)
    )
    return tmp_path / 'venv'


def test_complete_environment_takes_no_time(complete):
    started = time.perf_counter()
    result = run(SCRIPT, '--venv', complete)
    assert result.returncode == 0, result.stderr
    assert 'up to date' in result.stdout
    assert time.perf_counter() - started < 5  # below one second on an idle machine


def test_stamp_does_not_vouch_for_a_package_that_is_gone(setup_env, complete):
    wanted = setup_env.fingerprint('onedl', setup_env.EXTRAS)
    assert setup_env.is_current(complete, 'onedl', wanted)
    assert not setup_env.is_current(complete, 'pretrain', wanted)  # no mmpretrain
    next(complete.glob('lib/python*/site-packages/mmcv.py')).unlink()
    assert not setup_env.is_current(complete, 'onedl', wanted)


def test_fingerprint_follows_everything_that_decides(checkout, monkeypatch):
    def fingerprint(family='onedl', extras=('test',)):
        code = (
            'import sys, runpy; m = runpy.run_path(sys.argv[1]);'
            'print(m["fingerprint"](sys.argv[2], sys.argv[3:]))'
        )
        command = [sys.executable, '-c', code, checkout / 'tools' / 'setup_env.py', family, *extras]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    seen = [fingerprint(family=family) for family in ('onedl', 'original', 'pretrain')]
    seen.append(fingerprint(extras=('test', 'dev')))
    monkeypatch.setenv('SSN_TORCH', 'torch==2.12.0')
    seen.append(fingerprint())
    monkeypatch.delenv('SSN_TORCH')
    for name in ('requirements/test.txt', 'setup.py', 'tools/setup_env.py'):
        with (checkout / name).open('a') as file:
            file.write('\n# changed\n')
        seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
    assert fingerprint() == seen[-1]


def test_stamp_is_removed_before_and_absent_after_a_failure(setup_env, complete, monkeypatch):
    (complete / setup_env.STAMP).write_text('of an older set of requirements')
    monkeypatch.setattr(setup_env, 'check_machine', lambda venv, family: None)

    def fail(environment):
        assert not (environment.venv / setup_env.STAMP).exists()
        raise setup_env.SetupError('no network')

    monkeypatch.setattr(setup_env.Environment, 'build', fail)
    with pytest.raises(setup_env.SetupError, match='no network'):
        setup_env.set_up(complete, 'onedl', setup_env.EXTRAS)
    assert not (complete / setup_env.STAMP).exists()


# ---- interruption


def environment(setup_env, venv, lock):
    return setup_env.Environment(venv, 'onedl', [], lock)


def test_broken_environment_is_made_again(setup_env, tmp_path):
    venv = tmp_path / 'venv'
    make_venv(venv, pip='raise ImportError("half of pip")')
    assert setup_env.python_version(venv) == ()
    with setup_env.locked(venv) as lock:
        environment(setup_env, venv, lock).create()
    assert setup_env.python_version(venv) == sys.version_info[:2]


def test_working_environment_is_kept(setup_env, tmp_path):
    venv = tmp_path / 'venv'
    mark = make_venv(venv) / 'mine.py'
    mark.write_text('')
    with setup_env.locked(venv) as lock:
        environment(setup_env, venv, lock).create()
    assert mark.exists()


def test_package_interrupted_half_way_does_not_pass_for_installed(setup_env, tmp_path):
    venv = tmp_path / 'venv'
    site_packages = make_venv(venv)
    for name in ('whole-1.0.dist-info', 'half-1.0.dist-info'):
        (site_packages / name).mkdir()
        (site_packages / name / 'METADATA').write_text('')
    (site_packages / 'whole-1.0.dist-info' / 'INSTALLER').write_text('pip\n')
    with setup_env.locked(venv) as lock:
        environment(setup_env, venv, lock).create()
    assert [path.name for path in site_packages.glob('*.dist-info')] == ['whole-1.0.dist-info']


def test_survivor_of_a_killed_setup_holds_the_lock(setup_env, tmp_path, capfd):
    venv = tmp_path / 'venv'
    with setup_env.locked(venv) as lock:
        survivor = subprocess.Popen(
            [sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, pass_fds=[lock.fileno()]
        )
    waiting = subprocess.Popen(
        [
            sys.executable,
            '-u',
            '-c',
            'import pathlib, runpy, sys; m = runpy.run_path(sys.argv[1])\n'
            'with m["locked"](pathlib.Path(sys.argv[2])): print("got it")',
            SCRIPT,
            venv,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with survivor, waiting:
        assert 'is at work: waiting' in waiting.stdout.readline()
        assert waiting.poll() is None
        survivor.communicate(b'\n')
        assert waiting.stdout.readline() == 'got it\n'


# ---- failures of pip


@pytest.mark.parametrize(
    ('line', 'expected'),
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)",
            'check the network',
        ),
        ('OSError: [Errno 28] No space left on device', 'the disk is full'),
        ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('ERROR: Failed building wheel for onedl-mmcv', 'Failed building wheel for onedl-mmcv'),
        ("FileNotFoundError: 'README.md'", "FileNotFoundError: 'README.md'"),
    ],
)
def test_failure_of_pip_is_explained(setup_env, line, expected):
    around = [
        'Collecting x\n',
        f'      {line}\n',
        'error: metadata-generation-failed\n',
        'hint: See\n',
    ]
    assert expected in setup_env.explain(around)


def test_unreachable_index_ends_in_one_clear_line(tmp_path):
    venv = tmp_path / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', venv], check=True)
    ops = next(venv.glob('lib/python*/site-packages')) / 'mmcv' / '_ext.so'
    ops.parent.mkdir()
    ops.write_text('')  # or it would ask for a compiler and room on the disk
    result = run(
        SCRIPT,
        '--venv',
        venv,
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL='http://127.0.0.1:9/simple',  # the discard port: refused at once
        PIP_FIND_LINKS='',
        PIP_EXTRA_INDEX_URL='',
        PIP_RETRIES='1',
        PIP_NO_CACHE_DIR='1',
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith('setup_env: pip install: the package index')
    assert 'Traceback' not in result.stderr
    assert not (venv / 'setup.stamp').exists()


@pytest.fixture
def calls(setup_env, monkeypatch):
    """What would be asked of pip; a wheel that it builds is an empty file. The ops fail once."""
    seen = []
    outcomes = iter([1, 0])

    def pip(environment, *arguments):
        seen.append(arguments)
        if arguments[0] == 'wheel':
            folder = Path(arguments[arguments.index('--wheel-dir') + 1])
            folder.mkdir(parents=True)
            (folder / 'mmcv.whl').write_text('')

    def run_python(venv, option, code):
        asks_torch = 'torch.__version__' in code
        return subprocess.CompletedProcess(
            code, 0 if asks_torch else next(outcomes), '2.1.2+cu121 py311' * asks_torch, ''
        )

    monkeypatch.setattr(setup_env.Environment, 'pip', pip)
    monkeypatch.setattr(setup_env, 'run_python', run_python)
    return seen


def test_ops_that_do_not_work_are_compiled_again(setup_env, calls, tmp_path):
    """What pip has cached is thrown away, and what comes then is installed alone."""
    setup_env.Environment(tmp_path / 'venv', 'original', [], None).install_family()
    assert [call[0] for call in calls] == ['wheel', 'install', 'cache', 'wheel', 'install']
    assert calls[2] == ('cache', 'remove', 'mmcv')
    pins = (ROOT / 'requirements' / 'original.txt').read_text().split()
    for call in (calls[0], calls[3]):
        assert call[-1] in pins
        assert {'--no-build-isolation', '--no-deps'} < set(call)
    assert {'--force-reinstall', '--no-deps'} < set(calls[4])


def test_compiled_mmcv_is_kept_beside_the_environment(setup_env, calls, tmp_path):
    """A new environment with this torch and this Python finds the wheel and compiles nothing."""
    wheels = tmp_path / '.venv-wheels' / 'mmcv-2.1.0-2.1.2+cu121-py311'
    wheels.mkdir(parents=True)
    (wheels / 'mmcv.whl').write_text('')
    env = setup_env.Environment(tmp_path / 'venv', 'original', [], None)
    env.install_family()
    assert calls[0][:4] == ('install', '--no-build-isolation', '--find-links', str(wheels))
    assert env.wheels() == wheels  # it stands there after a rebuild, too
    assert [path.name for path in wheels.parent.iterdir()] == [wheels.name]


def test_mmcv_without_ops_never_meets_the_cache(setup_env, monkeypatch, tmp_path):
    """Neither does pip keep it for the other families, nor does it take theirs."""
    calls = []
    env = setup_env.Environment(tmp_path, 'pretrain', [], None)
    monkeypatch.setattr(env, 'pip', lambda *arguments: calls.append(arguments))
    env.install_family()
    alone, others = calls
    assert alone[-1].startswith('onedl-mmcv==')
    assert {'--no-cache-dir', '--no-deps'} < set(alone)
    assert '--no-build-isolation' not in alone  # or the build would see torch and compile
    assert others == ('install', '-r', str(ROOT / 'requirements' / 'pretrain.txt'))


def pins(name):
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return {line.split('==')[0]: line.split()[0] for line in lines if '==' in line}


@pytest.mark.parametrize(
    ('one', 'other', 'shared'),
    [
        ('onedl', 'pretrain', {'onedl-mmengine', 'onedl-mmcv', 'numpy', 'opencv-python'}),
        ('original', 'oldest', {'mmengine', 'numpy', 'opencv-python'}),
        ('original', 'torch2.1', {'numpy'}),
    ],
)
def test_what_families_share_has_one_version(one, other, shared):
    one, other = pins(one), pins(other)
    assert one.keys() & other.keys() == shared
    for name in shared:
        assert one[name] == other[name]


def test_extras_never_move_what_a_family_pins(setup_env, calls, tmp_path):
    setup_env.Environment(tmp_path / 'venv', 'original', ['test', 'docs'], None).install_extras()
    [call] = calls
    assert call[:3] == ('install', '-c', 'requirements/original.txt')
    assert 'requirements/docs.txt' in call
    assert 'requirements/triton.txt' not in call  # torch 2.1 pins its own, an older one
