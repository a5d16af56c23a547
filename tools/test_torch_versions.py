#!/usr/bin/env python3
"""Test layers and functions on one version of torch after the other.

Each gets an environment of its own (torch, numpy, pytest and hypothesis; 5 GB where torch comes
with CUDA), which is removed again. It prints a line for the table of docs/install.md.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ('2.1', '2.4', '2.6', '2.9', '2.11', '2.13', 'newest')
TESTS = (
    'tests/test_layers',
    'tests/test_ops',
    'tests/test_functional.py',
    'tests/test_training.py',
)
COUNTS = re.compile(r'\d+ (?:passed|failed|skipped|errors?)')


def install(venv: Path, version: str) -> None:
    """Create the environment, or take the one there."""
    python = venv / 'bin' / 'python'
    if not python.exists():
        subprocess.run([sys.executable, '-m', 'venv', venv], check=True)
    torch = 'torch' if version == 'newest' else f'torch=={version}.*'
    numpy = 'numpy<2' if version in ('2.1', '2.2') else 'numpy'  # 2.3 is the first that knows 2
    command = [python, '-m', 'pip', 'install', '-q', torch, numpy, 'pytest>=8', 'hypothesis']
    subprocess.run(command, check=True, env=os.environ | {'PIP_REQUIRE_VIRTUALENV': '1'})


def test(venv: Path, arguments: list) -> tuple[str, bool]:
    """Run the tests and return what came of them: a line, and whether all passed."""
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    python = venv / 'bin' / 'python'
    code = 'import torch, numpy; print("torch", torch.__version__, "| numpy", numpy.__version__)'
    named = subprocess.run([python, '-c', code], capture_output=True, text=True, check=True)
    command = [python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *(arguments or TESTS)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    )
    with process:
        for line in process.stdout:
            sys.stdout.write(line)
            last = line
    counts = ', '.join(COUNTS.findall(last)) or last.strip()
    line = f'| {named.stdout.strip()} | {datetime.date.today()} | {counts} |'
    return line, process.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example:\n  python tools/test_torch_versions.py 2.4 newest',
    )
    parser.add_argument(
        'versions', metavar='VERSION', nargs='*', help=f'default: {" ".join(VERSIONS)}'
    )
    parser.add_argument(
        '--folder', metavar='DIR', type=Path, default=ROOT, help='where the environments are made'
    )
    parser.add_argument('--keep', action='store_true', help='leave them there')
    parser.add_argument(
        '--pytest',
        metavar='ARG',
        nargs=argparse.REMAINDER,
        help='all that follows, for pytest instead of the tests of layers and functions',
    )
    args = parser.parse_args()
    if not args.folder.is_dir():
        sys.exit(f'test_torch_versions.py: --folder: no such folder: {args.folder}')
    told = []
    for version in args.versions or VERSIONS:
        venv = args.folder.resolve() / f'.venv-torch-{version}'
        try:
            install(venv, version)
            told.append(test(venv, args.pytest))
        except (OSError, subprocess.CalledProcessError) as error:
            line = f'| torch {version} | {datetime.date.today()} | not run: {error} |'
            told.append((line, False))
        finally:
            if not args.keep:
                shutil.rmtree(venv, ignore_errors=True)
    print('\n'.join(line for line, _ in told))
    if not all(passed for _, passed in told):
        sys.exit('test_torch_versions.py: not every version passed')


if __name__ == '__main__':
    main()
