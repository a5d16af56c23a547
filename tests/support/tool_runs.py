"""Runs the scripts in tools/, as processes of their own or in this one."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / 'tools'
# A set-up that goes on by mistake must not install anything.
NO_INDEX = dict(PIP_NO_INDEX='1', PIP_CONFIG_FILE=os.devnull)


def run(name: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a script, as a process of its own."""
    program = ['bash'] if name.endswith('.sh') else [sys.executable]
    result = subprocess.run(
        [*program, str(TOOLS / name), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | NO_INDEX,
        timeout=120,
    )
    return result.returncode, result.stdout, result.stderr


def run_here(name: str, *arguments: str) -> tuple[int, str, str]:
    """As :func:`run`, without the seconds that each process takes to import torch and mmengine.

    What Python does at the end of a process is done here; an error that would be a trace passes.
    """
    out, err = io.StringIO(), io.StringIO()
    argv, environment = sys.argv, os.environ.copy()
    sys.argv = [str(TOOLS / name), *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name='__main__')
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=err)
            code = 1
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
    return code, out.getvalue(), err.getvalue()
