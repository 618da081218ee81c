"""Reads the schema of a SQL store: the file schema.sql of its package, with one section per version."""

from __future__ import annotations

from importlib import resources

_VERSION_HEADER = "-- version "


def migrations(package: str) -> list[str]:
    """Return the SQL from each schema version to the next; the first is for an empty database.

    Args:
        package: the name of the store's package.
    """
    text = resources.files(package).joinpath("schema.sql").read_text(encoding="utf-8")
    return [section.partition("\n")[2] for section in text.split(_VERSION_HEADER)[1:]]
