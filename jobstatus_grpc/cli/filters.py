"""Which jobs: the filter flags that `list` and `watch` share → JobFilter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import click
from click.core import ParameterSource

from jobstatus_grpc.cli import candidates, flags, values
from jobstatus_grpc.cli.flags import Decorator, flag
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.state import JobState

_FLAGS: Sequence[Decorator] = (
    flag(
        "--id ID", "A job. May be repeated: any of them.", to="any_id", multiple=True, shell_complete=candidates.job_ids
    ),
    flags.state("Such as failed. May be repeated: any of them.", to="any_state", multiple=True),
    flag(
        "--name TEXT",
        "The whole name. May be repeated: any of them.",
        to="any_name",
        multiple=True,
        cls=flags.OneALine,
    ),
    flag("--name-prefix TEXT", "How the name begins.", default=""),
    flags.labels("May be repeated: all of them."),
    flag("--parent ID", "The parts of this job.", to="parent_id", default="", shell_complete=candidates.job_ids),
    flag(
        "--created-after WHEN",
        "Then or later: RFC 3339, or a duration ago; 1h is within the last hour.",
        type=values.past_instant,
    ),
    flag("--created-before WHEN", "Earlier: RFC 3339, or a duration ago.", type=values.past_instant),
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
