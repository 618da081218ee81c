"""`jobstatus migrate`: migrate a store's schema in advance, so that servers can run without the rights for it."""

from __future__ import annotations

import asyncio

import click

from jobstatus_grpc.cli.options import stored


@click.command()
@stored("The store, such as postgresql://USER@HOST/DATABASE.")
def migrate(*, store: str) -> None:
    """Bring a store's schema up to date, and print its version.

    `jobstatus serve` does so too if it has the rights. On PostgreSQL, running servers of an older version keep working
    until they are restarted. A SQLite store must not be served meanwhile.
    """
    from jobstatus_grpc.stores import migrate_store

    version = asyncio.run(migrate_store(store))
    click.echo(f"the store's schema has version {version}" if version else "the store is up to date")
