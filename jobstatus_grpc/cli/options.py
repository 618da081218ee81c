"""How flags are declared, and the flags that several commands share, with the values that a shell completes for them.

`flag` declares one flag. The filter flags of `list` and `watch` become one JobFilter by `filtered`. The flags that
connect to the server are in `connection`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.core import ParameterSource

from jobstatus_grpc.cli import parsers
from jobstatus_grpc.cli.target import rank, target_of
from jobstatus_grpc.job import JobFilter, JobState, limits

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from jobstatus_grpc.job import Job

MAX_COMPLETIONS = 50
"""How many job ids a shell is offered: more do not fit on a screen."""

MAX_URL_BYTES = 65536
"""Of the file of --store-file."""

COMPLETION_TIMEOUT_SECONDS = 1.0
"""How long a Tab may wait for job ids from the server."""

Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


def flag(spelling: str, text: str, *, to: str = "", **settings: Any) -> Decorator:
    """Declare a flag, as click.option does.

    Args:
        spelling: `--name VALUE`, or `--name` alone for a switch; `-n --name` adds a short name.
        text: the help.
        to: the name of the argument that gets the value. Default: the flag's name.
        settings: for click.option. `envvar` is JOBSTATUS_NAME unless given; a default is shown in the help.
    """
    *names, last = spelling.split()
    if last.startswith("-"):
        names.append(last)
        settings["is_flag"] = True
    else:
        settings["metavar"] = last
        settings.setdefault("type", parsers.text)
        settings["show_default"] = settings.get("default", "") != ""
    settings.setdefault("envvar", "JOBSTATUS_" + names[-1].removeprefix("--").replace("-", "_").upper())
    return click.option(*names, *filter(None, [to]), help=text, **settings)


def duration_flag(
    spelling: str,
    text: str,
    *,
    default: str | None = None,
    shortest: timedelta = timedelta(0),
    longest: timedelta,
    or_off: bool = False,
    **settings: Any,
) -> Decorator:
    """Declare a flag that takes a duration within bounds; for `or_off` see parsers.duration."""
    parser = parsers.duration(shortest=shortest, longest=longest, or_off=or_off)
    return flag(spelling, text, type=parser, **settings, **({} if default is None else {"default": default}))


class LinesOption(click.Option):
    """A repeated flag. Its variable has one value per line, because values may contain spaces, where click splits."""

    def value_from_envvar(self, ctx: click.Context) -> list[str] | None:
        """Return the values in the variable; None if it is unset."""
        value = self.resolve_envvar_value(ctx)
        return None if value is None else [line for line in value.split("\n") if line]


def complete_states(
    among: Iterable[JobState],
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return a function that completes the names of these states."""
    words = [state.word for state in sorted(among)]

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _completions((word, "") for word in words if word.startswith(incomplete.lower()))

    return complete


def complete_job_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the ids of the newest jobs: those that the server sends within COMPLETION_TIMEOUT_SECONDS."""
    found: list[Job] = []
    with contextlib.suppress(Exception):  # a traceback would break the line that is being typed
        found.extend(itertools.islice(_newest_jobs(ctx, incomplete), MAX_COMPLETIONS))
    return _completions((job.id, f"{job.name} {job.state.word}".strip()) for job in found)


def _newest_jobs(ctx: click.Context, prefix: str) -> Iterator[Job]:
    deadline = time.monotonic() + COMPLETION_TIMEOUT_SECONDS
    with target_of(ctx).open() as client:
        token = ""
        while (left := deadline - time.monotonic()) > 0:
            # The service has no filter for the beginning of an id.
            page_size = limits.MAX_PAGE_SIZE if prefix else MAX_COMPLETIONS
            page = client.list(page_size=page_size, page_token=token, timeout_seconds=left)
            yield from (job for job in page.jobs if job.id.startswith(prefix))
            token = page.next_page_token
            if not token:
                return


def _completions(values: Iterable[tuple[str, str]]) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(value, help=text or None) for value, text in values]


job_id = click.argument("id", metavar="ID", type=parsers.text, shell_complete=complete_job_ids)


def stored(text: str, *, default: str | None = None) -> Decorator:
    """Declare --store and --store-file, and pass the store's URL to the command as one argument `store`.

    Args:
        text: the help of --store.
        default: the URL if neither is given; None: one of them is required.
    """

    def declare(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_store(*positional: Any, store: str | None, store_file: str | None, **arguments: Any) -> Any:
            ranks = [rank(name) for name in ("store", "store_file")]
            if store_file is not None and ranks[0] == ranks[1]:
                raise click.UsageError("Give one of --store and --store-file.")
            if store_file is not None and ranks[1] > ranks[0]:
                store = _url_in(store_file)
            if store is None:
                raise click.UsageError("Missing option --store or --store-file.")
            return command(*positional, store=store, **arguments)

        file = flag("--store-file FILE", "A file with the URL of --store in it, which may hold a password.")
        declared: Callable[..., Any] = file(with_store)
        if default is None:
            return flag("--store URL", f"{text} Required, or --store-file.")(declared)
        return flag("--store URL", text, default=default)(declared)

    return declare


def _url_in(path: str) -> str:
    """Return the text of a file without the white space around it."""
    try:
        with open(path, encoding="utf-8") as file:
            url = file.read(MAX_URL_BYTES).strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise click.UsageError(f"--store-file {path} cannot be read: {why}") from None
    if not url or "\n" in url:
        raise click.UsageError(f"--store-file {path} must hold the URL of the store and nothing else.")
    return url


def beside_flag(argument: str, metavar: str, flag_name: str, *, type: Callable[[str], Any]) -> Decorator:
    """Declare an argument that may be given instead of the flag `--flag_name`, whose value `command` gets."""

    def declare(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_argument(*positional: Any, **arguments: Any) -> Any:
            value = arguments.pop(argument)
            if value is not None:
                if click.get_current_context().get_parameter_source(flag_name) is ParameterSource.COMMANDLINE:
                    raise click.UsageError(f"{metavar} contradicts --{flag_name}; give one of them.")
                arguments[flag_name] = value
            return command(*positional, **arguments)

        declared: Callable[..., Any] = click.argument(argument, metavar=f"[{metavar}]", required=False, type=type)(
            with_argument
        )
        return declared

    return declare


def job_ids(*, required: bool = True) -> Decorator:
    """Declare ID as an argument that may be repeated."""
    metavar = "ID..." if required else "[ID]..."
    return click.argument(
        "ids", metavar=metavar, nargs=-1, required=required, type=parsers.text, shell_complete=complete_job_ids
    )


def state(text: str, *, among: Iterable[JobState] = JobState, **settings: Any) -> Decorator:
    """Declare --state STATE; a shell completes the states in `among`."""
    return flag("--state STATE", text, type=parsers.state, shell_complete=complete_states(among), **settings)


def labels(text: str = "A label. May be repeated.") -> Decorator:
    """Declare --label KEY=VALUE, which may be repeated; the argument `labels` gets pairs."""
    return flag("--label KEY=VALUE", text, to="labels", type=parsers.label, multiple=True, cls=LinesOption)


def heartbeat_timeout(*, default: str | None = None) -> Decorator:
    """Declare --heartbeat-timeout; `off` is accepted if there is a default."""
    return duration_flag(
        "--heartbeat-timeout DURATION",
        "Without an update for this time the job is stalled; 1s to 7d.",
        default=default,
        shortest=limits.MIN_HEARTBEAT_TIMEOUT,
        longest=limits.MAX_HEARTBEAT_TIMEOUT,
        or_off=default is not None,
    )


def parent(text: str = "The job that this one is part of.", **settings: Any) -> Decorator:
    """Declare --parent ID, as the argument `parent_id`."""
    return flag("--parent ID", text, to="parent_id", default="", shell_complete=complete_job_ids, **settings)


progress = flag("--progress PERCENT", "From 0 to 100.", type=parsers.percent)

eta = flag(
    "--eta WHEN", "Estimated completion: RFC 3339, or a duration from now.", to="estimated_completion",
    type=parsers.instant,
)  # fmt: skip

expected_revision = flag(
    "--revision --expected-revision N",
    "Refuse the call unless the job has this revision; 0: any.",
    to="expected_revision",
    type=parsers.count(2**63 - 1),
    default=0,
)

request_id = flag(
    "--request-id TEXT", "Calls with the same request id take effect once: makes a retry safe.", default=""
)

as_json = flag("--json", "Print JSON, one line per job.", to="as_json")

_FILTER_FLAGS: Sequence[Decorator] = (
    flag(
        "--id ID",
        "One of these jobs. May be repeated.",
        to="any_id",
        multiple=True,
        shell_complete=complete_job_ids,
        envvar=None,  # JOBSTATUS_ID names the job of `create` and `run`
    ),
    state("One of these states, such as failed. May be repeated.", to="states", multiple=True),
    flag(
        "--name TEXT",
        "One of these names, each the whole name. May be repeated.",
        to="names",
        multiple=True,
        cls=LinesOption,
    ),
    flag("--name-prefix TEXT", "The beginning of the name.", default=""),
    labels("All of these labels. May be repeated."),
    parent("The children of this job."),
    flag(
        "--created-after WHEN",
        "Created then or later: RFC 3339, or a duration ago; 1h means within the last hour.",
        type=parsers.past_instant,
    ),
    flag("--created-before WHEN", "Created earlier: RFC 3339, or a duration ago.", type=parsers.past_instant),
    flag("--done/--not-done", "Only jobs that have ended, or have not.", default=None, envvar="JOBSTATUS_DONE"),
    flag(
        "--stalled/--not-stalled", "Only jobs that are stalled, or are not.", default=None, envvar="JOBSTATUS_STALLED"
    ),
)

FILTER_ARGUMENTS = {field.name: field.name for field in dataclasses.fields(JobFilter)} | {"ids": "any_id"}
"""The fields of a JobFilter → the arguments that _FILTER_FLAGS set. `ids` are the jobs that a command names."""


def filtered(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the filter flags, and pass them to `command` as one argument `filter`."""

    @functools.wraps(command)
    def with_filter(**arguments: Any) -> Any:
        fields = {field: arguments.pop(argument) for field, argument in FILTER_ARGUMENTS.items()}
        return command(filter=JobFilter(**fields | {"labels": _all_labels(fields["labels"])}), **arguments)

    declared: Callable[..., Any] = with_filter
    for declare in reversed(_FILTER_FLAGS):
        declared = declare(declared)
    return declared


def filter_flags_given(ctx: click.Context) -> list[str]:
    """Return the filter flags on the command line; those set by variables do not count."""
    return [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in FILTER_ARGUMENTS.values()
        and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]


def _all_labels(labels: Iterable[tuple[str, str]]) -> dict[str, str]:
    wanted = dict(labels)
    for key, value in labels:
        if wanted[key] != value:
            raise click.UsageError(f"--label {key} is given with two values, and no job has both.")
    return wanted
