"""The flags that connect to the server: address, credentials, timeout. For all commands that call it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from jobstatus_grpc import errors
from jobstatus_grpc.cli import parsers, profiles
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.cli.target import ARGUMENTS, DEFAULT_TIMEOUT, target_of, warn_of_unused_variables

_PEM = click.Path(exists=True, dir_okay=False, readable=True)

_FLAGS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "address": (
        "--address HOST:PORT",
        "The server; grpcs://HOST:PORT for TLS, or unix:/path.",
        {"type": parsers.address, "default": "127.0.0.1:50051"},
    ),
    "timeout": (
        "--timeout DURATION",
        "The deadline of each call.",
        {"type": profiles.TIMEOUT, "default": parsers.spell(DEFAULT_TIMEOUT)},
    ),
    "token": ("--token TEXT", "The bearer token. Other users see it in the process list: prefer a file.", {}),
    "token_file": (
        "--token-file FILE",
        "A file with the bearer token, which is read again when it changes.",
        {"type": click.Path(exists=True, dir_okay=False, readable=True)},
    ),
    "token_command": ("--token-command TEXT", "A command that prints the bearer token.", {}),
    "tenant": ("--tenant TEXT", "Work in this tenant; needs the role admin.", {}),
    "ca": ("--ca FILE", "Use TLS and trust this CA (PEM).", {"to": "ca_file", "type": _PEM}),
    "cert": ("--cert FILE", "The client's certificate (PEM); with --key.", {"to": "cert_file", "type": _PEM}),
    "key": ("--key FILE", "The client's private key (PEM); with --cert.", {"to": "key_file", "type": _PEM}),
    "server_name": (
        "--server-name NAME", "Use TLS, and expect this name in the server's certificate. Default: the host.", {},
    ),
    "insecure": ("--insecure", "Allow to send the token to another machine without TLS.", {}),
}  # fmt: skip

_PROFILE = flag(
    "--profile NAME",
    "Take what other flags leave out from this profile. Default: the current one, without --address.",
    type=profiles.check_name,
)


def connected(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the flags, and pass them to `command` as one argument `connection`."""
    return _with_flags(command, _FLAGS)


def connected_without_timeout(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `connected`, for a command with its own --timeout; its argument must not be called `timeout`."""
    return _with_flags(command, [key for key in _FLAGS if key != "timeout"])


def setting_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the same flags, without defaults and variables, for a command that keeps what they say."""
    for spelling, text, settings in reversed(list(_FLAGS.values())):
        command = flag(spelling, text, **settings | {"default": None, "envvar": None})(command)
    return command


def _with_flags(command: Callable[..., Any], keys: Iterable[str]) -> Callable[..., Any]:
    keys = list(keys)

    @functools.wraps(command)
    def with_connection(**arguments: Any) -> Any:
        ctx = click.get_current_context()
        connection = target_of(ctx)
        warn_of_unused_variables(ctx)
        others = {name: value for name, value in arguments.items() if name not in own}
        try:
            return command(connection=connection, **others)
        except (errors.UnavailableError, errors.DeadlineExceededError) as error:
            # An error with a reason is the server's answer; others are from the channel and lack the address.
            raise error if error.reason else type(error)(f"no answer from {connection.address}: {error}") from None

    own = {"profile", *(ARGUMENTS[key] for key in keys)}
    declared: Callable[..., Any] = _PROFILE(with_connection)
    for spelling, text, settings in reversed([_FLAGS[key] for key in keys]):
        declared = flag(spelling, text, **settings)(declared)
    return declared
