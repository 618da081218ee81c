"""The flags that connect to the server: address, credentials, timeout. For all commands that call it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from jobstatus_grpc import errors
from jobstatus_grpc.cli import exits, parsers
from jobstatus_grpc.cli.options import Decorator, duration_flag, flag

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobStatusClient
    from jobstatus_grpc.client.connection import Endpoint

DEFAULT_TIMEOUT = timedelta(seconds=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to reach the server."""

    address: str
    token: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    timeout_seconds: float
    """Deadline of each call."""

    def open(self) -> JobStatusClient:
        """Return a client, for a `with` block."""
        from jobstatus_grpc.client import JobStatusClient

        exits.print_logged_warnings()
        try:
            return JobStatusClient(
                self.address,
                token=self.token,
                ca_file=self.ca_file,
                cert_file=self.cert_file,
                key_file=self.key_file,
                timeout_seconds=self.timeout_seconds,
            )
        except (ValueError, OSError) as error:
            raise click.UsageError(str(error)) from None

    def endpoint(self) -> Endpoint:
        """Return an endpoint that opens a plain gRPC channel, for services other than ours."""
        from jobstatus_grpc.client.connection import endpoint

        try:
            return endpoint(
                self.address,
                token=self.token,
                ca_file=self.ca_file,
                cert_file=self.cert_file,
                key_file=self.key_file,
            )
        except (ValueError, OSError) as error:
            raise click.UsageError(str(error)) from None


_PEM = click.Path(exists=True, dir_okay=False, readable=True)

_ADDRESS = flag("--address HOST:PORT", "The server; or unix:/path.", type=parsers.address, default="127.0.0.1:50051")

_TIMEOUT = duration_flag(
    "--timeout DURATION",
    "The deadline of each call.",
    default=parsers.spell(DEFAULT_TIMEOUT),
    shortest=timedelta(milliseconds=1),
    longest=timedelta(days=365),
    or_seconds=True,
)

_CREDENTIALS = (
    flag("--token TEXT", "The bearer token; safer as JOBSTATUS_TOKEN, which other users cannot read."),
    flag("--ca FILE", "Use TLS and trust this CA (PEM).", to="ca_file", type=_PEM),
    flag("--cert FILE", "The client's certificate (PEM); with --key.", to="cert_file", type=_PEM),
    flag("--key FILE", "The client's private key (PEM); with --cert.", to="key_file", type=_PEM),
)

_NAMES = ("address", "token", "ca_file", "cert_file", "key_file")


def connected(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the flags, and pass them to `command` as one argument `connection`."""
    return _with_flags(command, (_ADDRESS, _TIMEOUT, *_CREDENTIALS))


def connected_without_timeout(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `connected`, for a command with its own --timeout; its argument must not be called `timeout`."""
    return _with_flags(command, (_ADDRESS, *_CREDENTIALS))


def _with_flags(command: Callable[..., Any], declarations: Sequence[Decorator]) -> Callable[..., Any]:
    @functools.wraps(command)
    def with_connection(*, timeout: timedelta = DEFAULT_TIMEOUT, **others: Any) -> Any:
        own = {name: others.pop(name) for name in _NAMES}
        if (own["cert_file"] is None) != (own["key_file"] is None):
            raise click.UsageError("--cert and --key go together.")
        connection = Connection(**own, timeout_seconds=timeout.total_seconds())
        try:
            return command(connection=connection, **others)
        except (errors.UnavailableError, errors.DeadlineExceededError) as error:
            # An error with a reason is the server's answer; others are from the channel and lack the address.
            raise error if error.reason else type(error)(f"no answer from {connection.address}: {error}") from None

    declared: Callable[..., Any] = with_connection
    for declare in reversed(declarations):
        declared = declare(declared)
    return declared
