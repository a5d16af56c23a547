"""What a user gave wrong, in one line; tools print it and exit with 1."""


class InputError(Exception):
    """Something the user gave or should have provided; its text is one line."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; its text is one line."""


def in_one_line(error: Exception) -> str:
    """Return the kind of an error that other code raised, and its text's first line with words.

    Example:
        >>> from ssn_plugin.errors import in_one_line
        >>> in_one_line(KeyError('no such key'))
        "KeyError: 'no such key'"
    """
    lines = (line.strip() for line in str(error).splitlines())
    return f'{type(error).__name__}: {next(filter(None, lines), "")}'
