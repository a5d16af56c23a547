"""Which versions a run is made with."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ssn_plugin.version import __version__

# The maintained distribution before the original one of the same import name.
_HOSTS = {
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
}


def versions() -> dict[str, str]:
    """Versions of this package, torch, Python and the host packages that are installed.

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
    for name, distributions in _HOSTS.items():
        for distribution in distributions:
            try:
                found[name] = f'{version(distribution)} ({distribution})'
                break
            except PackageNotFoundError:
                continue
    found['device'] = _device()
    return found


def _device() -> str:
    if torch.cuda.is_available():
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    return f'CPU, {torch.get_num_threads()} threads'
