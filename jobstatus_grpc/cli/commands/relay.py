"""`jobstatus relay`: deliver the ends of jobs to a webhook, a command or Slack."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from jobstatus_grpc.cli import exits, options, output, parsers
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.options import duration_flag, flag
from jobstatus_grpc.cli.target import Connection
from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.job import JobFilter

if TYPE_CHECKING:
    from jobstatus_grpc.relay.place import Place
    from jobstatus_grpc.relay.relay import RelaySettings
    from jobstatus_grpc.relay.targets import Target

DEFAULT_SOURCE = "/jobstatus"

SECRET_VARIABLE = "JOBSTATUS_WEBHOOK_SECRET"
"""Has the signing secret, if no file has it. There is no flag: other users see those in the process list."""

MAX_FILE_BYTES = 65536
"""Of a file with a URL or with secrets."""

_SHARED = ("postgresql://", "postgres://")

_FILE = click.Path(exists=True, dir_okay=False, readable=True)


def _reference(value: str) -> str:
    if not value or any(character <= " " or character == "\x7f" for character in value):
        raise click.BadParameter("must be a URI, or its path, without spaces")
    return parsers.text(value)


def _relay_name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value, re.ASCII) is None:
        raise click.BadParameter("must be 1 to 64 letters, digits, dots, hyphens or underscores")
    return value


@click.command()
@flag("--webhook URL", "Send CloudEvents to this URL. Other users see it in the process list.")
@flag("--webhook-file FILE", "A file with the URL of --webhook.", type=_FILE)
@flag(
    "--structured", "Send CloudEvents in structured mode, as one JSON object. Default: binary, as headers and the job."
)
@flag(
    "--webhook-secret-file FILE",
    f"A file with the secret that signs webhooks (Standard Webhooks), one a line. Default: ${SECRET_VARIABLE}.",
    type=_FILE,
)
@flag("--slack URL", "Send a line to this incoming webhook of Slack. Other users see it in the process list.")
@flag("--slack-file FILE", "A file with the URL of --slack.", type=_FILE)
@flag(
    "--exec CMD",
    "Run this line of shell, with the event as JSON on stdin and as JOBSTATUS_EVENT_* variables.",
    to="command",
)
@flag(
    "--state-file FILE",
    "Stores the position of the relay; one relay at a time can use it. postgresql://USER@HOST/DATABASE: relays of one "
    "--relay-name share it, one delivers and the others wait.",
    required=True,
)
@flag("--relay-name NAME", "The name of the relays that share a --state-file on PostgreSQL.", type=_relay_name)
@flag("--on WHAT", "Deliver the end of each job, or each state.", type=click.Choice(["end", "state"]), default="end")
@options.filtered
@duration_flag(
    "--retry-for DURATION",
    "How long a delivery that fails is tried again, before it goes to --dead-letter-file.",
    default="12h",
    longest=timedelta(days=3650),
)
@flag(
    "--dead-letter-file FILE",
    "Where events go that could not be delivered, as JSON lines. Default: the state file's name, or the relay's, and "
    ".dead-letters.",
)
@duration_flag(
    "--delivery-timeout DURATION",
    "How long the receiver has for its answer, or the command to end.",
    default="15s",
    shortest=timedelta(milliseconds=100),
    longest=timedelta(days=1),
)
@flag(
    "--concurrency N",
    "Deliveries at a time; those of one job are in order.",
    type=parsers.count(256, smallest=1),
    default=8,
)
@flag("--source URI", "The source of the CloudEvents.", type=_reference, default=DEFAULT_SOURCE)
@connected
@click.pass_context
def relay(
    ctx: click.Context,
    /,
    *,
    connection: Connection,
    webhook: str | None,
    webhook_file: str | None,
    structured: bool,
    webhook_secret_file: str | None,
    slack: str | None,
    slack_file: str | None,
    command: str | None,
    state_file: str,
    relay_name: str | None,
    on: str,
    filter: JobFilter,
    retry_for: timedelta,
    dead_letter_file: str | None,
    delivery_timeout: timedelta,
    concurrency: int,
    source: str,
) -> None:
    """Deliver the end of each job to a webhook, Slack or a command, at least once.

    The first start begins with the jobs that end from then on; a later one goes on where the last one was, also after a
    crash. An event that is delivered again has the same id. See docs/relay.md.

    Runs until Ctrl-C or SIGTERM.
    """
    from jobstatus_grpc.relay.place import PlaceError
    from jobstatus_grpc.relay.relay import RelaySettings, append
    from jobstatus_grpc.relay.targets import Command, Slack, Webhook

    is_shared = state_file.startswith(_SHARED)
    if is_shared != (relay_name is not None):
        raise click.UsageError("Give --relay-name with a --state-file on PostgreSQL, and only with that.")
    dead_letter_file = dead_letter_file or f"{relay_name if is_shared else state_file}.dead-letters"
    settings = RelaySettings(
        filter=filter,
        is_each_state=on == "state",
        source=source,
        concurrency=concurrency,
        retry_seconds=retry_for.total_seconds(),
        dead_letter_file=dead_letter_file,
    )
    if not settings.watched.possible_states:
        raise click.UsageError("No job that has ended matches the filter flags; --on state delivers other states too.")
    webhook, slack = _url("webhook", webhook, webhook_file), _url("slack", slack, slack_file)
    if sum(each is not None for each in (webhook, slack, command)) != 1:
        raise click.UsageError("Give one of --webhook, --slack and --exec.")
    timeout_seconds = delivery_timeout.total_seconds()
    target: Target
    if webhook is not None:
        secrets = _secrets(webhook_secret_file)
        target = Webhook(webhook, secrets=secrets, is_structured=structured, timeout_seconds=timeout_seconds)
    elif slack is not None:
        target = Slack(slack, timeout_seconds=timeout_seconds)
    else:
        target = Command(command or "", timeout_seconds=timeout_seconds)
    try:
        append(dead_letter_file, b"")
    except OSError as error:
        raise click.UsageError(f"--dead-letter-file {dead_letter_file} cannot be written: {error.strerror}") from None
    try:
        ctx.exit(asyncio.run(_relay(connection, target, settings, lambda: _place(state_file, relay_name, on))))
    except PlaceError as error:
        exits.say_error(f"{error}. What was not saved is delivered again")
        ctx.exit(exits.FAILED)


async def _place(state_file: str, relay_name: str | None, kind: str) -> Place:
    """Return the place once this relay has it."""
    from jobstatus_grpc.relay.place import FilePlace

    if relay_name is None:
        return FilePlace(state_file, kind)
    try:
        from jobstatus_grpc.relay.shared_place import open_shared_place
    except ModuleNotFoundError as error:
        needed = f"--state-file postgresql: needs {error.name}; pip install 'jobstatus-grpc[postgres]'"
        raise CannotStartError(needed) from None
    waiting = f"waiting: another relay {relay_name} delivers"
    return await open_shared_place(state_file, relay_name, kind, waiting=lambda: click.echo(waiting))


async def _relay(
    connection: Connection, target: Target, settings: RelaySettings, open_place: Callable[[], Awaitable[Place]]
) -> int:
    """Deliver events until a signal, and return the exit code."""
    from jobstatus_grpc.relay.relay import keep_relaying

    stopping, signals = asyncio.Event(), list[int]()

    def stop(number: int) -> None:
        signals.append(number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    async with connection.open_async() as client:
        await keep_relaying(
            client,
            target,
            settings,
            open_place,
            stopping,
            to_object=output.to_object,
            begun=lambda: click.echo(f"relaying to {target.name}"),
        )
    return exits.INTERRUPTED if signals[0] == signal.SIGINT else exits.SUCCEEDED


def _url(name: str, url: str | None, file: str | None) -> str | None:
    """Return the URL of a flag or of its file; None: there is neither."""
    from jobstatus_grpc.relay.targets import parse_url

    if url is not None and file is not None:
        raise click.UsageError(f"Give one of --{name} and --{name}-file.")
    if file is not None:
        url = _text_of(f"--{name}-file", file)
    if url is not None:
        try:
            parse_url(url)
        except ValueError as error:
            raise click.UsageError(f"--{name}: the URL {error}.") from None
    return url


def _secrets(file: str | None) -> Sequence[bytes]:
    from jobstatus_grpc.relay.targets import read_secrets

    text = os.environ.get(SECRET_VARIABLE) if file is None else _text_of("--webhook-secret-file", file)
    if text is None:
        return ()
    try:
        return read_secrets(text)
    except ValueError as error:
        raise click.UsageError(f"{SECRET_VARIABLE if file is None else file}: {error}.") from None


def _text_of(flag_name: str, path: str) -> str:
    from jobstatus_grpc.files import read_file

    try:
        return read_file(path, max_bytes=MAX_FILE_BYTES).decode().strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise click.UsageError(f"{flag_name} {path} cannot be read: {why}") from None
