"""How flags are declared: each is a variable JOBSTATUS_… too, and texts are checked to be UTF-8."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias

import click

from jobstatus_grpc import limits
from jobstatus_grpc.cli import values

Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


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


def labels(text: str = "May be repeated.") -> Decorator:
    """Take --label KEY=VALUE any number of times, as pairs."""
    return flag("--label KEY=VALUE", text, to="labels", type=values.label, multiple=True)


job_id = click.argument("id", metavar="ID", type=values.text)
as_json = flag("--json", "Print JSON, one line a job.", to="as_json")
request_id = flag("--request-id TEXT", "Makes a retry safe: one effect, however often it is sent.", default="")
eta = flag("--eta WHEN", "RFC 3339, or a duration from now.", to="estimated_completion", type=values.instant)
progress = flag("--progress PERCENT", "From 0 to 100.", type=values.percent)
