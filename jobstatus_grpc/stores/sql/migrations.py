"""The schemas of stores that keep jobs in a database: an SQL file each, with a section for every version."""

from __future__ import annotations

from importlib import resources

_VERSION_HEADER = "-- version "


def migrations(package: str) -> list[str]:
    """Return the SQL that leads from each schema version to the next, the first from nothing.

    Args:
        package: the store's own, where schema.sql is.
    """
    text = resources.files(package).joinpath("schema.sql").read_text(encoding="utf-8")
    return [section.partition("\n")[2] for section in text.split(_VERSION_HEADER)[1:]]
