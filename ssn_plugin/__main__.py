"""Runs a script of tools/ where there is no clone: ``python -m ssn_plugin collapse ...``."""

import ast
import runpy
import sys
from pathlib import Path

_TOOLS = Path(__file__).parent / '.mim' / 'tools'
_OF_A_CLONE = ('setup_env', 'test_torch_versions')  # they make environments for its tests
_PROGRAM = 'python -m ssn_plugin'


def tools() -> dict[str, str]:
    """The scripts by name, and what each is for: the first line of its docstring."""
    found = {}
    for path in sorted(_TOOLS.glob('*.py')):
        if path.stem not in _OF_A_CLONE:
            text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
            found[path.stem] = text.partition('\n')[0]
    return found


def overview() -> str:
    """What ``python -m ssn_plugin`` prints."""
    lines = [f'usage: {_PROGRAM} TOOL ...    ({_PROGRAM} TOOL --help tells the rest)', '']
    return '\n'.join([*lines, *(f'  {name:24}{text}' for name, text in tools().items())])


def main() -> None:
    """Run the tool that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if not tools():
        sys.exit(f'ssn_plugin: no such folder: {_TOOLS}; install it by "pip install --no-deps ."')
    if name in ('-h', '--help'):
        print(overview())
        return
    if name not in tools():
        print(overview(), file=sys.stderr)
        print(f'{_PROGRAM}: error: TOOL: got {name!r}, expected one of these', file=sys.stderr)
        sys.exit(2)
    try:
        tool = runpy.run_path(str(_TOOLS / f'{name}.py'), run_name=name)
    except ModuleNotFoundError as error:
        sys.exit(f'{name}: {error}: install it, or mmengine, which brings what the tools need')
    sys.argv = [f'{_PROGRAM} {name}', *sys.argv[2:]]  # what its usage shows
    sys.exit(tool['main']())


if __name__ == '__main__':
    main()
