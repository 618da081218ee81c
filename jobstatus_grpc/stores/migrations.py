"""The schemas of stores that keep jobs in a database: an SQL file each, with a section for every version."""

from __future__ import annotations

from importlib import resources

_VERSION_HEADER = "-- version "


def migrations(script: str) -> list[str]:
    """Return the SQL that leads from each schema version to the next, the first from nothing.

    Args:
        script: the name of a file in this package.
    """
    text = resources.files(__package__).joinpath(script).read_text(encoding="utf-8")
    return [section.partition("\n")[2] for section in text.split(_VERSION_HEADER)[1:]]
