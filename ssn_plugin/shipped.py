"""Where the configs lie that come with the package."""

from pathlib import Path

_CONFIGS = Path(__file__).parent / '.mim' / 'configs'


def config_path(name: str) -> str:
    """Path of a config of this package, to extend it without a clone.

    ``_base_`` of a config is evaluated before anything in it is imported, so there it takes::

        _base_ = [__import__('ssn_plugin').config_path('_base_/ssn_training.py')]

    Args:
        name: Path below the folder of configs.

    Returns:
        The absolute path.

    Raises:
        FileNotFoundError: If there is none of that name; the message tells those beside it.

    Example:
        >>> from pathlib import Path
        >>> import ssn_plugin
        >>> Path(ssn_plugin.config_path('_base_/ssn_training.py')).name
        'ssn_training.py'
    """
    path = _CONFIGS / name
    if not path.is_file():
        beside = path.parent if path.parent.is_dir() else _CONFIGS
        found = sorted(each.relative_to(_CONFIGS).as_posix() for each in beside.glob('*'))
        known = ', '.join(each for each in found if not each.endswith(('.md', '.yml', '__')))
        raise FileNotFoundError(f'name: got {name!r}, expected a config such as {known or "none"}')
    return str(path)
