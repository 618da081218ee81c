"""The flags that connect to the server: address, credentials, timeout. For all commands that call it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from jobstatus_grpc import errors
from jobstatus_grpc.cli import exits, parsers
from jobstatus_grpc.cli.options import Decorator, duration_flag, flag

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobStatusClient, Tls
    from jobstatus_grpc.client.endpoint import Endpoint

DEFAULT_TIMEOUT = timedelta(seconds=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to reach the server."""

    address: str
    token: str | None = None
    tenant: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None
    insecure: bool = False
    timeout_seconds: float
    """Deadline of each call."""

    def open(self) -> JobStatusClient:
        """Return a client, for a `with` block."""
        from jobstatus_grpc.client import JobStatusClient

        exits.print_logged_warnings()
        with _usage_errors():
            return JobStatusClient(
                self.address,
                token=self.token,
                tenant=self.tenant,
                tls=self.tls(),
                insecure=self.insecure,
                timeout_seconds=self.timeout_seconds,
            )

    def endpoint(self) -> Endpoint:
        """Return an endpoint that opens a plain gRPC channel, for services other than ours."""
        from jobstatus_grpc.client.endpoint import endpoint

        with _usage_errors():
            return endpoint(self.address, token=self.token, tenant=self.tenant, tls=self.tls(), insecure=self.insecure)

    def tls(self) -> Tls | None:
        """Return what a client takes as `tls`; None: TLS if the address says so."""
        from jobstatus_grpc.client.endpoint import tls_of

        return tls_of(self.ca_file, self.cert_file, self.key_file, self.server_name)


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None


_PEM = click.Path(exists=True, dir_okay=False, readable=True)

_ADDRESS = flag(
    "--address HOST:PORT",
    "The server; grpcs://HOST:PORT for TLS, or unix:/path.",
    type=parsers.address,
    default="127.0.0.1:50051",
)

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
    flag("--tenant TEXT", "Work in this tenant; needs the role admin."),
    flag("--ca FILE", "Use TLS and trust this CA (PEM).", to="ca_file", type=_PEM),
    flag("--cert FILE", "The client's certificate (PEM); with --key.", to="cert_file", type=_PEM),
    flag("--key FILE", "The client's private key (PEM); with --cert.", to="key_file", type=_PEM),
    flag("--server-name NAME", "Use TLS, and expect this name in the server's certificate. Default: the host."),
    flag("--insecure", "Allow to send the token to another machine without TLS."),
)

_NAMES = ("address", "token", "tenant", "ca_file", "cert_file", "key_file", "server_name", "insecure")


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
        connection = Connection(**own, timeout_seconds=timeout.total_seconds())
        if (connection.cert_file is None) != (connection.key_file is None):
            raise click.UsageError("--cert and --key go together.")
        try:
            return command(connection=connection, **others)
        except (errors.UnavailableError, errors.DeadlineExceededError) as error:
            # An error with a reason is the server's answer; others are from the channel and lack the address.
            raise error if error.reason else type(error)(f"no answer from {connection.address}: {error}") from None

    declared: Callable[..., Any] = with_connection
    for declare in reversed(declarations):
        declared = declare(declared)
    return declared
