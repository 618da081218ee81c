"""Keys, and what stores must know of what is found under them."""

from __future__ import annotations

from typing import TypeAlias

from jobstatus_grpc.errors import InvalidTokenError

MAX_EXAMINED_ROWS = 10_000
"""So many jobs are looked at for one page; where too few of them match, it is short."""

Cursor: TypeAlias = tuple[int, int]
"""When a job was created, in microseconds since 1970, and its number among those that were."""


def write_cursor(cursor: Cursor) -> str:
    """Return the text that `read_cursor` reads."""
    return f"{cursor[0]}.{cursor[1]}"


def read_cursor(text: str) -> Cursor:
    """Return the place in a list that `text` names.

    Raises:
        InvalidTokenError: it names none.
    """
    created, _, number = text.partition(".")
    if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in (created, number)):
        raise InvalidTokenError
    return int(created), int(number)
