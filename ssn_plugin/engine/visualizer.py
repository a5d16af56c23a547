"""A log or a visualizer whose files cannot be written does not end a training."""

import functools
import logging
import sys
from collections.abc import Callable

from mmengine.visualization import Visualizer

_WRITING = ('add_config', 'add_graph', 'add_scalar', 'add_scalars', 'add_image', 'add_datasample')


def tolerate_full_disk(visualizer: Visualizer, logger: logging.Logger) -> None:
    """Make errors of the file system one line, whoever it is that logs or visualizes.

    mmengine's LoggerHook hands the visualizer what it logs, so on a full disk a training would end
    there, with hours to go until the next checkpoint. The log itself prints a stack trace a line.
    """
    said: list[str] = []

    def tolerant(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(*args, **kwargs) -> None:
            try:
                method(*args, **kwargs)
            except OSError as error:
                if not said:
                    said.append(str(error))
                    logger.warning(
                        f'the visualizer cannot write ({error}); the training goes on, and what it '
                        'misses from now on is lost'
                    )

        call.tolerates = True
        return call

    for name in _WRITING:
        method = getattr(visualizer, name, None)
        if method is not None and not getattr(method, 'tolerates', False):
            setattr(visualizer, name, tolerant(method))
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = functools.partial(_say_once, handler, set())


def _say_once(handler: logging.FileHandler, said: set[int], record: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        logging.FileHandler.handleError(handler, record)
    elif not said:
        said.add(error.errno)
        print(f'{handler.baseFilename}: cannot be written: {error.strerror}', file=sys.stderr)
