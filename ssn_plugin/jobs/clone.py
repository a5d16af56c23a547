"""What lies beside the package in a clone of the repository, and is in no wheel."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from ssn_plugin.errors import InputError

CLONE = Path(__file__).resolve().parents[2]


def import_demo_data() -> ModuleType:
    """Import ``demo_data``, which makes the data sets of the demos and of the tests.

    Raises:
        InputError: If this package was installed without a clone.
        ImportError: If scikit-image is missing.
    """
    if not (CLONE / 'demo_data').is_dir():
        raise InputError(
            f'demo_data: not in {CLONE}, because the installed package comes without it; clone the '
            'repository, install it with `pip install -e .` and run this again'
        )
    if str(CLONE) not in sys.path:
        sys.path.append(str(CLONE))
    return importlib.import_module('demo_data')
