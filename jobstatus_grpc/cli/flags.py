"""How flags are declared: each is a variable JOBSTATUS_… too, and texts are checked to be UTF-8."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeAlias

import click

from jobstatus_grpc import limits
from jobstatus_grpc.cli import candidates, values
from jobstatus_grpc.state import JobState

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
        settings.setdefault("type", values.text)
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
    parser = values.duration(shortest=shortest, longest=longest, **kinds)
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
    return flag("--state STATE", text, type=values.state, shell_complete=candidates.states(among), **settings)


def labels(text: str = "May be repeated.") -> Decorator:
    """Take --label KEY=VALUE any number of times, as pairs."""
    return flag("--label KEY=VALUE", text, to="labels", type=values.label, multiple=True, cls=OneALine)


def job_ids(*, required: bool = True) -> Decorator:
    """Take ID any number of times, as ids."""
    metavar = "ID..." if required else "[ID]..."
    return click.argument(
        "ids", metavar=metavar, nargs=-1, required=required, type=values.text, shell_complete=candidates.job_ids
    )


job_id = click.argument("id", metavar="ID", type=values.text, shell_complete=candidates.job_ids)
parent = flag(
    "--parent ID", "The job that this one is part of.", to="parent_id", default="", shell_complete=candidates.job_ids
)
expected_revision = flag(
    "--revision --expected-revision N",
    "Refused unless the job is at this revision; 0: any.",
    to="expected_revision",
    type=values.count(2**63 - 1),
    default=0,
)
as_json = flag("--json", "Print JSON, one line a job.", to="as_json")
request_id = flag("--request-id TEXT", "Makes a retry safe: one effect, however often it is sent.", default="")
eta = flag("--eta WHEN", "RFC 3339, or a duration from now.", to="estimated_completion", type=values.instant)
progress = flag("--progress PERCENT", "From 0 to 100.", type=values.percent)
