"""`jobstatus migrate`: prepares a store beforehand, as a role that may, so that servers need not be allowed to."""

from __future__ import annotations

import asyncio

import click

from jobstatus_grpc.cli.options import flag


@click.command()
@flag("--store URL", "Such as postgresql://USER@HOST/DATABASE.", required=True)
def migrate(*, store: str) -> None:
    """Bring a store's schema up to date, and print its version.

    `jobstatus serve` does so too, where it may; servers of an older version go on until they are restarted.
    """
    from jobstatus_grpc.stores import migrate_store

    version = asyncio.run(migrate_store(store))
    click.echo(f"the store's schema has version {version}" if version else "the store is up to date")
