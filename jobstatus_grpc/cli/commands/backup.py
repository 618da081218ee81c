"""`jobstatus backup` and `jobstatus restore`: copies of a store, made while it is served, and copied back."""

from __future__ import annotations

import click

from jobstatus_grpc.cli.options import stored
from jobstatus_grpc.server.config import ServerConfig

_FILE = click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))


@click.command()
@_FILE
@stored("Such as sqlite:///FILE.", default=ServerConfig().store)
def backup(*, file: str, store: str) -> None:
    """Write a copy of the store to FILE, also while it is served.

    The copy is verified, and FILE is replaced once it is whole.
    """
    from jobstatus_grpc.stores import back_up_store

    jobs = back_up_store(store, file)
    click.echo(f"wrote a backup to {file}; jobs: {jobs}")


@click.command()
@_FILE
@stored("Such as sqlite:///FILE.")
def restore(*, file: str, store: str) -> None:
    """Replace the store with the backup in FILE.

    No server may have the store open. What it has now is lost, unless it is backed up first.
    """
    from jobstatus_grpc.stores import restore_store

    jobs = restore_store(store, file)
    click.echo(f"restored the store from {file}; jobs: {jobs}")
