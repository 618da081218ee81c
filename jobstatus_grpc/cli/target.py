"""Which server a command calls, and with which credentials: flags, then variables, then a profile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from jobstatus_grpc.cli import exits, profiles

if TYPE_CHECKING:
    from jobstatus_grpc.client import AsyncJobStatusClient, JobStatusClient, Tls
    from jobstatus_grpc.client.endpoint import Endpoint
    from jobstatus_grpc.client.token import Token

C = TypeVar("C")

DEFAULT_TIMEOUT = timedelta(seconds=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to reach the server."""

    address: str
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None
    token_command: str | Sequence[str] | None = field(default=None, repr=False)
    tenant: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None
    insecure: bool = False
    timeout_seconds: float
    """Deadline of each call."""

    def open(self, *, tracing: bool = False) -> JobStatusClient:
        """Return a client, for a `with` block; `tracing` as of JobStatusClient."""
        from jobstatus_grpc.client import JobStatusClient

        return self._open(partial(JobStatusClient, tracing=tracing))

    def open_async(self) -> AsyncJobStatusClient:
        """Return a client for asyncio, for an `async with` block."""
        from jobstatus_grpc.client import AsyncJobStatusClient

        return self._open(AsyncJobStatusClient)

    def _open(self, client: Callable[..., C]) -> C:
        exits.print_logged_warnings()
        with _usage_errors():
            return client(
                self.address,
                token=self._token(),
                tenant=self.tenant,
                tls=self.tls(),
                insecure=self.insecure,
                timeout_seconds=self.timeout_seconds,
            )

    def endpoint(self) -> Endpoint:
        """Return an endpoint that opens a plain gRPC channel, for services other than ours."""
        from jobstatus_grpc.client.endpoint import endpoint

        with _usage_errors():
            return endpoint(
                self.address, token=self._token(), tenant=self.tenant, tls=self.tls(), insecure=self.insecure
            )

    def tls(self) -> Tls | None:
        """Return what a client takes as `tls`; None: TLS if the address says so."""
        from jobstatus_grpc.client.endpoint import tls_of

        return tls_of(self.ca_file, self.cert_file, self.key_file, self.server_name)

    def _token(self) -> Token | None:
        from jobstatus_grpc.client.token import token_of

        return token_of(self.token, self.token_file, self.token_command)


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None


ARGUMENTS = {key: f"{key}_file" if key in ("ca", "cert", "key") else key for key in profiles.READERS}
"""The settings of a profile → the arguments that the flags set."""

_PAIR = ("cert", "key")

_GROUPS = (profiles.TOKENS, _PAIR, *((key,) for key in ARGUMENTS if key not in (*profiles.TOKENS, *_PAIR)))
"""Settings that are taken from one source together: flags, variables or the profile."""

_RANKS = {ParameterSource.COMMANDLINE: 2, ParameterSource.ENVIRONMENT: 1}


def rank(argument: str) -> int:
    """Return whether the running command got an argument by a flag (2), by a variable (1), or neither (0)."""
    return _rank(click.get_current_context(), argument)


def _rank(ctx: click.Context, argument: str) -> int:
    return _RANKS.get(ctx.get_parameter_source(argument) or ParameterSource.DEFAULT, 0)


def warn_of_unused_variables(ctx: click.Context) -> None:
    """Print which variables `target_of` leaves out because they are for another server; nothing if there are none."""
    unused = {ARGUMENTS[key]: f"JOBSTATUS_{key.upper()}" for key in _variables_of_another_server(ctx)}
    by_flag = any(_rank(ctx, ARGUMENTS[key]) == 2 for key in profiles.TOKENS)
    names = [name for argument, name in unused.items() if not (by_flag and argument in profiles.TOKENS)]
    if names:
        exits.say(
            f"jobstatus: not used for {ctx.params['address']}: {', '.join(names)}, for the server of "
            "JOBSTATUS_ADDRESS; give the flags, such as --token-file"
        )


def _variables_of_another_server(ctx: click.Context) -> list[str]:
    """Return the credentials in variables, and the permission to send them without TLS, that --address leaves out.

    They are for the server of JOBSTATUS_ADDRESS. Where that is not set, they are for each server.
    """
    its_address = os.environ.get("JOBSTATUS_ADDRESS")
    if not its_address or _rank(ctx, "address") != 2 or ctx.params["address"] == its_address:
        return []
    credentials = (*profiles.TOKENS, *_PAIR, "insecure")
    return [key for key in credentials if ctx.params[ARGUMENTS[key]] and _rank(ctx, ARGUMENTS[key]) == 1]


def target_of(ctx: click.Context) -> Connection:
    """Return how to reach the server that the flags of a command name.

    Raises:
        click.UsageError: flags contradict each other or the profile.
        FileError: the profile cannot be read.
    """
    found = {name: ctx.params[name] for name in ARGUMENTS.values() if name in ctx.params}
    ranks = {name: _rank(ctx, name) for name in found}
    for key in _variables_of_another_server(ctx):
        found[ARGUMENTS[key]] = False if key == "insecure" else None
        ranks[ARGUMENTS[key]] = 0
    settings = _settings_of_profile(ctx.params.get("profile"), found["address"] if ranks["address"] else None)
    for group in _GROUPS:
        arguments = {key: ARGUMENTS[key] for key in group if ARGUMENTS[key] in found}
        best = max((ranks[name] for name in arguments.values()), default=0)
        for key, name in arguments.items():
            if best == 0:
                found[name] = settings.get(key, found[name])
            elif group is profiles.TOKENS and ranks[name] < best:
                found[name] = None
    timeout: timedelta = found.pop("timeout", None) or DEFAULT_TIMEOUT
    if (found["cert_file"] is None) != (found["key_file"] is None):
        raise click.UsageError("--cert and --key go together.")
    return Connection(**found, timeout_seconds=timeout.total_seconds())


def _settings_of_profile(name: str | None, address: str | None) -> dict[str, Any]:
    """Return the settings of the profile of this name, or of the current one if no address is given either.

    A profile's token, certificate and CA are never used for another address than the profile's.
    """
    if name is None and address is not None:
        return {}
    found = profiles.read()
    name = name or found.current
    if name is None:
        return {}
    settings = dict(found.find(name))
    if address is not None and address != settings["address"]:
        raise click.UsageError(
            f"The address {address} (--address or JOBSTATUS_ADDRESS) is not that of the profile {name}; its "
            f"credentials are for {settings['address']}; leave out one of them."
        )
    return settings
