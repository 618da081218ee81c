"""`jobstatus profile`: keeps by name how to reach a server, and what to prove there."""

from __future__ import annotations

import os
from typing import Any

import click

from jobstatus_grpc.cli import exits, parsers, profiles
from jobstatus_grpc.cli.connection import setting_flags
from jobstatus_grpc.cli.target import ARGUMENTS


@click.group()
def profile() -> None:
    """Keep by name how to reach a server.

    Profiles are in ~/.config/jobstatus/config.toml, or where JOBSTATUS_CONFIG says. A flag wins over a variable
    JOBSTATUS_..., and a variable over the profile. A profile is not used for another address than its own.
    """


_NAME = click.argument("name", type=profiles.check_name)


@profile.command(name="set")
@_NAME
@setting_flags
def set_profile(*, name: str, **arguments: Any) -> None:
    """Make the profile NAME, or change the settings of it that are given.

    Paths are kept as absolute ones. The file gets mode 0600.
    """
    given = {key: _as_kept(key, arguments[name]) for key, name in ARGUMENTS.items() if arguments[name] is not None}
    if len([key for key in profiles.TOKENS if key in given]) > 1:
        raise click.UsageError("Give one of --token, --token-file and --token-command.")
    is_new = name not in profiles.read().profiles
    settings = {} if is_new else profiles.as_written()[name]
    if is_new and "address" not in given:
        raise click.UsageError(f"The profile {name} is new and needs --address.")
    moves = not is_new and given.get("address", settings["address"]) != settings["address"]
    replaced = [*profiles.TOKENS] if moves or any(key in given for key in profiles.TOKENS) else []
    kept = {key: value for key, value in settings.items() if key not in replaced}
    if moves and len(kept) < len(settings) and not any(key in given for key in profiles.TOKENS):
        exits.say(f"The token was for {settings['address']} and is removed; set one for {given['address']}.")
    merged = kept | given
    if ("cert" in merged) != ("key" in merged):
        raise click.UsageError("--cert and --key go together.")
    profiles.save(name, merged)
    exits.say(f"{profiles.file_path()} has the profile {name}; use it with --profile {name} or jobstatus profile use")


def _as_kept(key: str, value: Any) -> Any:
    if key in ("token_file", "ca", "cert", "key"):
        return os.path.abspath(value)
    return parsers.spell(value) if key == "timeout" else value


@profile.command(name="list")
def list_profiles() -> None:
    """Print all profiles and their addresses; * marks the current one."""
    found = profiles.read()
    width = max(map(len, found.profiles), default=0)
    for name, settings in found.profiles.items():
        click.echo(f"{'*' if name == found.current else ' '} {name:<{width}}  {settings['address']}")


@profile.command()
@_NAME
def use(*, name: str) -> None:
    """Make NAME the profile of commands that get neither --profile nor --address."""
    profiles.read().find(name)
    profiles.use(name)


@profile.command()
@_NAME
def show(*, name: str) -> None:
    """Print the settings of a profile, but no token."""
    for key, value in profiles.read().find(name).items():
        shown = parsers.spell(value) if key == "timeout" else str(value).lower() if value is True else value
        click.echo(f"{key:<14} {'(set, not shown)' if key in profiles.SECRETS else shown}")


@profile.command()
@_NAME
def delete(*, name: str) -> None:
    """Remove a profile."""
    profiles.read().find(name)
    profiles.delete(name)
