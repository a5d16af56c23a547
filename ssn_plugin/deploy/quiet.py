"""Silence while a network is recorded."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(logger: logging.Logger) -> Iterator[None]:
    """Without warnings, and without what a logger says below an error.

    Recording makes torch and mmengine remark on their own code, on absent packages and on operators
    they do not count, of which a user can change nothing.
    """
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)
