"""Which jobs: the filter flags that `list` and `watch` share → JobFilter."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.core import ParameterSource

from jobstatus_grpc.cli import parsers
from jobstatus_grpc.job import JobFilter, JobState, limits

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

    from jobstatus_grpc.job import Job

MOST = 50

PATIENCE_SECONDS = 1.0


def states(among: Iterable[JobState]) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return what offers those of these states that begin as what is typed."""
    words = [state.word for state in sorted(among)]

    def offer(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _offer((word, "") for word in words if word.startswith(incomplete.lower()))

    return offer


def complete_job_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the newest jobs whose ids begin so, as far as they come in time."""
    # grpc's C core tells stderr of servers that it does not reach.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    found: list[Job] = []
    with contextlib.suppress(Exception):  # a traceback would land in the middle of the line that is being typed
        found.extend(itertools.islice(_newest_jobs(ctx, incomplete), MOST))
    return _offer((job.id, f"{job.name} {job.state.word}".strip()) for job in found)


def _newest_jobs(ctx: click.Context, prefix: str) -> Iterator[Job]:
    from jobstatus_grpc.client import JobStatusClient

    deadline = time.monotonic() + PATIENCE_SECONDS
    where = {name: ctx.params[name] for name in ("address", "token", "ca_file", "cert_file", "key_file")}
    with JobStatusClient(**where) as client:
        token = ""
        while (left := deadline - time.monotonic()) > 0:
            # No filter of the service knows how an id begins.
            page = client.list(
                page_size=limits.MAX_PAGE_SIZE if prefix else MOST, page_token=token, timeout_seconds=left
            )
            yield from (job for job in page.jobs if job.id.startswith(prefix))
            token = page.next_page_token
            if not token:
                return


def _offer(values: Iterable[tuple[str, str]]) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(value, help=text or None) for value, text in values]


Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


class OneALine(click.Option):
    """A repeated flag whose values may hold spaces, at which click would break its variable: that has one a line."""

    def value_from_envvar(self, ctx: click.Context) -> list[str] | None:
        """Return the values in the variable; None where it is unset."""
        value = self.resolve_envvar_value(ctx)
        return None if value is None else [line for line in value.split("\n") if line]


def flag(spelling: str, text: str, *, to: str = "", **settings: Any) -> Decorator:
    """Declare an option as click.option does.

    Args:
        spelling: `--name VALUE`, or `--name` alone for a switch; `-n --name` gives it a short name.
        text: the help.
        to: the argument that gets the value, where it is not called as the flag.
        settings: for click.option. `envvar` is JOBSTATUS_NAME unless given; a default is shown.
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
    **settings: Any,
) -> Decorator:
    """Declare a flag that takes a duration within bounds; for `or_off` and `or_seconds` see values.duration."""
    kinds = {kind: settings.pop(kind) for kind in ("or_off", "or_seconds") if kind in settings}
    parser = parsers.duration(shortest=shortest, longest=longest, **kinds)
    return flag(spelling, text, type=parser, **settings, **({} if default is None else {"default": default}))


def heartbeat_timeout(*, default: str | None = None) -> Decorator:
    """Take --heartbeat-timeout; without a default `off` makes no sense."""
    return duration_flag(
        "--heartbeat-timeout DURATION",
        "Stalled after so long without an update; 1s to 7d.",
        default=default,
        shortest=limits.MIN_HEARTBEAT_TIMEOUT,
        longest=limits.MAX_HEARTBEAT_TIMEOUT,
        or_off=default is not None,
    )


def state(text: str, *, among: Iterable[JobState] = JobState, **settings: Any) -> Decorator:
    """Take --state STATE; the states in `among` are offered where it is completed."""
    return flag("--state STATE", text, type=parsers.state, shell_complete=states(among), **settings)


def labels(text: str = "May be repeated.") -> Decorator:
    """Take --label KEY=VALUE any number of times, as pairs."""
    return flag("--label KEY=VALUE", text, to="labels", type=parsers.label, multiple=True, cls=OneALine)


def job_ids(*, required: bool = True) -> Decorator:
    """Take ID any number of times, as ids."""
    metavar = "ID..." if required else "[ID]..."
    return click.argument(
        "ids", metavar=metavar, nargs=-1, required=required, type=parsers.text, shell_complete=complete_job_ids
    )


job_id = click.argument("id", metavar="ID", type=parsers.text, shell_complete=complete_job_ids)

parent = flag(
    "--parent ID", "The job that this one is part of.", to="parent_id", default="", shell_complete=complete_job_ids
)

expected_revision = flag(
    "--revision --expected-revision N",
    "Refused unless the job is at this revision; 0: any.",
    to="expected_revision",
    type=parsers.count(2**63 - 1),
    default=0,
)

as_json = flag("--json", "Print JSON, one line a job.", to="as_json")

request_id = flag("--request-id TEXT", "Makes a retry safe: one effect, however often it is sent.", default="")

eta = flag("--eta WHEN", "RFC 3339, or a duration from now.", to="estimated_completion", type=parsers.instant)

progress = flag("--progress PERCENT", "From 0 to 100.", type=parsers.percent)

_FLAGS: Sequence[Decorator] = (
    flag(
        "--id ID", "A job. May be repeated: any of them.", to="any_id", multiple=True, shell_complete=complete_job_ids
    ),
    state("Such as failed. May be repeated: any of them.", to="any_state", multiple=True),
    flag(
        "--name TEXT",
        "The whole name. May be repeated: any of them.",
        to="any_name",
        multiple=True,
        cls=OneALine,
    ),
    flag("--name-prefix TEXT", "How the name begins.", default=""),
    labels("May be repeated: all of them."),
    flag("--parent ID", "The parts of this job.", to="parent_id", default="", shell_complete=complete_job_ids),
    flag(
        "--created-after WHEN",
        "Then or later: RFC 3339, or a duration ago; 1h is within the last hour.",
        type=parsers.past_instant,
    ),
    flag("--created-before WHEN", "Earlier: RFC 3339, or a duration ago.", type=parsers.past_instant),
    flag("--done/--not-done", "Only those that have ended, or have not.", default=None, envvar="JOBSTATUS_DONE"),
    flag(
        "--stalled/--not-stalled", "Only those that are stalled, or are not.", default=None, envvar="JOBSTATUS_STALLED"
    ),
)

_ARGUMENTS = (
    "any_id", "any_state", "any_name", "name_prefix", "labels", "parent_id", "created_after", "created_before", "done",
    "stalled",
)  # fmt: skip


def filtered(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the filter's flags, as one argument `filter`."""

    @functools.wraps(command)
    def with_filter(**arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in _ARGUMENTS}
        return command(filter=_filter(**given), **arguments)

    declared: Callable[..., Any] = with_filter
    for declare in reversed(_FLAGS):
        declared = declare(declared)
    return declared


def typed(ctx: click.Context) -> list[str]:
    """Return the filter's flags that stand on the command line, and not in variables only."""
    return [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in _ARGUMENTS and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]


def _filter(
    *,
    any_id: tuple[str, ...],
    any_state: tuple[JobState, ...],
    any_name: tuple[str, ...],
    name_prefix: str,
    labels: tuple[tuple[str, str], ...],
    parent_id: str,
    created_after: datetime | None,
    created_before: datetime | None,
    done: bool | None,
    stalled: bool | None,
) -> JobFilter:
    wanted = dict(labels)
    for key, value in labels:
        if wanted[key] != value:
            raise click.UsageError(f"--label {key} is given with two values, and no job has both.")
    return JobFilter(
        ids=any_id,
        states=any_state,
        names=any_name,
        name_prefix=name_prefix,
        labels=wanted,
        parent_id=parent_id,
        created_after=created_after,
        created_before=created_before,
        done=done,
        stalled=stalled,
    )
