"""`jobstatus token new`: makes a token, and the stanza by which a server accepts it."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import click

from jobstatus_grpc.auth import Role
from jobstatus_grpc.cli import exits, parsers
from jobstatus_grpc.cli.options import duration_flag, flag
from jobstatus_grpc.job import DEFAULT_TENANT


@click.group()
def token() -> None:
    """Make tokens for the callers of a server."""


@token.command()
@click.argument("name", type=parsers.text)
@flag(
    "--role ROLE",
    "What the caller may do: watcher (read), worker (+ create, update), operator (+ cancel, delete), admin (operator "
    "in every tenant).",
    type=click.Choice([role.name.lower() for role in Role]),
    required=True,
    envvar=None,
)
@flag("--tenant TENANT", "The tenant whose jobs the caller sees.", default=DEFAULT_TENANT, envvar=None)
@duration_flag(
    "--expires DURATION",
    "How long the token is valid.",
    default="off",
    shortest=timedelta(seconds=1),
    longest=timedelta(days=36_500),
    or_off=True,
    envvar=None,
)
@flag("--json", "Print the token, its SHA-256 and the stanza as a JSON object.", to="as_json", envvar=None)
def new(*, name: str, role: str, tenant: str, expires: timedelta | None, as_json: bool) -> None:
    """Print a new token for the caller NAME, and the stanza for the server's file of --auth.

    The token goes to stdout, and is kept nowhere: the stanza, on stderr, has only its SHA-256.
    """
    from jobstatus_grpc.auth import tokens

    value = tokens.make_token()
    expires_at = None if expires is None else datetime.now(timezone.utc) + expires
    try:
        stanza = tokens.stanza_of(value, name, Role[role.upper()], tenant=tenant, expires_at=expires_at)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if as_json:
        click.echo(json.dumps({"token": value, "sha256": tokens.digest_of(value).hex(), "stanza": stanza}))
        return
    click.echo(value)
    exits.say("# The token is shown only now. Add this to the file of serve --auth:")
    click.echo(f"\n{stanza}", err=True, nl=False)
