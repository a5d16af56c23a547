"""The checkpoint that a work dir names as its last."""

from pathlib import Path

from ssn_plugin.errors import InputError


def last_checkpoint(folder: str | Path) -> str | None:
    """What ``last_checkpoint`` in a work dir says; None where there is no such file.

    Raises:
        InputError: If it cannot be read or names no file.
    """
    note = Path(folder, 'last_checkpoint')  # mmengine writes it
    if not note.exists():
        return None
    try:
        named = note.read_text().strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'it is no text'
        raise InputError(f'{note}: cannot read it: {reason}') from error
    if not named.isprintable() or not named:
        raise InputError(f'{note}: names no file, expected the path of a checkpoint')
    return named
