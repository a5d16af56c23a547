"""Which versions a run is made with."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ssn_plugin.version import __version__

# The maintained distribution before the original one of the same import name.
_FRAMEWORKS = {
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
}


def versions() -> dict[str, str]:
    """Versions of this package, torch, Python, the installed frameworks and the device.

    Nothing is imported for it.

    Example:
        >>> from ssn_plugin.engine.versions import versions
        >>> list(versions())[:3]
        ['ssn_plugin', 'torch', 'python']
    """
    found = {
        'ssn_plugin': __version__,
        'torch': torch.__version__,
        'python': platform.python_version(),
    }
    for name, distributions in _FRAMEWORKS.items():
        for distribution in distributions:
            try:
                found[name] = f'{version(distribution)} ({distribution})'
                break
            except PackageNotFoundError:
                continue
    found['device'] = _device()
    return found


def code_version(folder: Path) -> str:
    """The commit that the code in a checkout is of, for what was measured with it.

    '-dirty' follows if a Python file is not as committed; what a measurement itself has written
    does not count. Where git has no files of the folder it is the version of this package.

    Example:
        >>> from pathlib import Path
        >>> from ssn_plugin.engine.versions import code_version
        >>> code_version(Path('/')).startswith('v')
        True
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ['git', *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git('ls-files', '.'):  # the folder lies in a checkout of another project
            return f'v{__version__}'
        commit = git('rev-parse', '--short=8', 'HEAD')
        return f'{commit}-dirty' if git('status', '--porcelain', ':/*.py') else commit
    except (FileNotFoundError, subprocess.CalledProcessError):  # there is no git, or no checkout
        return f'v{__version__}'


def _device() -> str:
    if torch.cuda.is_available():
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    return f'CPU, {torch.get_num_threads()} threads'
