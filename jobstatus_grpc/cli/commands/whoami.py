"""`jobstatus whoami`: the identity as which the server makes this caller's calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobstatus_grpc.cli import options, output
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.target import Connection
from jobstatus_grpc.cli.text import one_line

if TYPE_CHECKING:
    from jobstatus_grpc.auth import Identity


@click.command()
@options.as_json
@connected
def whoami(*, connection: Connection, as_json: bool) -> None:
    """Print the identity that the server gives you: principal, tenant, role, jobs that you are limited to, expiry."""
    with connection.open() as client:
        identity = client.whoami()
    click.echo(output.identity_to_json(identity) if as_json else _summary(identity))


def _summary(identity: Identity) -> str:
    """Return the fields that are set, one per line."""
    unproved = "" if identity.authenticated else " (not authenticated: the server runs without --auth)"
    only = identity.only
    labels = [] if only is None else [f"label {key}={value}" for key, value in sorted(only.labels.items())]
    names = [f"name {only.name_prefix}*"] if only is not None and only.name_prefix else []
    rows = {
        "principal": f"{identity.principal}{unproved}",
        "tenant": identity.tenant,
        "role": identity.role.name.lower(),
        "only": ", ".join(labels + names),
        "expires": output.instant(identity.expires_at),
    }
    return "\n".join(f"{name:<10} {one_line(value)}" for name, value in rows.items() if value)
