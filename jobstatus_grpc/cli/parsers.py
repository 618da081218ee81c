"""Text of arguments and variables → values. Parsers raise click.BadParameter, which is printed with the flag's name."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NoReturn

import click

from jobstatus_grpc.address import parse_address
from jobstatus_grpc.job import JobState, to_state

_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}

_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)

_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+", re.ASCII)

_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)


def text(value: str) -> str:
    """Return `value` unchanged; it must be valid UTF-8, because protobuf refuses other text."""
    try:
        value.encode()  # Python decodes invalid bytes in arguments to lone surrogates
    except UnicodeEncodeError:
        raise click.BadParameter("is not valid UTF-8") from None
    return value


def duration(
    *,
    shortest: timedelta = timedelta(0),
    longest: timedelta = timedelta(days=36_500),
    or_off: bool = False,
) -> Callable[[str], timedelta | None]:
    """Return a parser of durations within these bounds, both included; with `or_off`, of `off` too, as None.

    Each has a unit: `--retention 7` would be taken for days by its writer, and for seconds here.
    """

    def parse(value: str) -> timedelta | None:
        if or_off and value == "off":
            return None
        parsed = _timedelta(value)
        if parsed is None:
            why = "has no unit" if _NUMBER.fullmatch(value) else "is not a duration"
            raise click.BadParameter(f"{value!r} {why}; write 250ms, 90s, 10m, 1h, 7d{' or off' * or_off}")
        if not shortest <= parsed <= longest:
            raise click.BadParameter(f"{value} is not within {spell(shortest)} to {spell(longest)}")
        return parsed

    return parse


def _timedelta(value: str) -> timedelta | None:
    if not _DURATION.fullmatch(value):
        return None
    try:
        parts: list[tuple[str, str]] = _DURATION_PART.findall(value)
        return timedelta(seconds=sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts))
    except OverflowError:
        return timedelta.max


def spell(value: timedelta) -> str:
    """Return `value` as text that `duration` accepts, in the largest unit with a whole number."""
    milliseconds = round(value / timedelta(milliseconds=1))
    for unit in ("d", "h", "m", "s"):
        count, rest = divmod(milliseconds, round(_UNIT_SECONDS[unit] * 1000))
        if not rest and (count or unit == "s"):
            return f"{count}{unit}"
    return f"{milliseconds}ms"


def state(value: str) -> JobState:
    """Return the state: `failed`, `in_progress`, `in-progress` or `JOB_STATE_FAILED`, in any case."""
    try:
        return to_state(value)
    except ValueError:
        words = ", ".join(each.word for each in JobState)
        raise click.BadParameter(f"{value!r} is not a state; these are: {words}") from None


def label(value: str) -> tuple[str, str]:
    """Return the key and the value of `key=value`, split at the first `=`."""
    key, equals, rest = text(value).partition("=")
    if not equals or not key:
        raise click.BadParameter(f"{value!r} is not a label; write KEY=VALUE")
    return key, rest


def address(value: str) -> str:
    """Return an address for a client: HOST:PORT, grpcs://HOST, unix:/path, or another scheme of gRPC."""
    try:
        parse_address(text(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


def new_file(value: str) -> str:
    """Return the path of a file that can be written, which is found out before anything is done for it."""
    path = Path(value)
    if path.is_dir() or not path.parent.is_dir():
        raise click.BadParameter(
            f"{value!r} is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise click.BadParameter(f"{value!r} cannot be written")
    return value


def percent(value: str) -> float:
    """Return a number from 0 to 100; `42%` is accepted too."""
    try:
        number = float(value.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 <= number <= 100:
        raise click.BadParameter(f"{value!r} is not a number from 0 to 100")
    return number


def progress_regex(value: str) -> re.Pattern[str]:
    """Return a regular expression with one or two groups."""
    try:
        pattern = re.compile(text(value))
    except re.error as error:
        raise click.BadParameter(f"{value!r} is not a regular expression: {error}") from None
    if pattern.groups not in (1, 2):
        raise click.BadParameter(f"{value!r} must have one group, or two: write ( ) around each number")
    return pattern


def instant(value: str) -> datetime:
    """Return a point in time: RFC 3339, or a duration from now."""
    since_now = _timedelta(value)
    if since_now is not None:
        try:
            return datetime.now(timezone.utc) + since_now
        except OverflowError:
            raise click.BadParameter(f"{value} from now is after the year 9999") from None
    return _rfc3339(value, "from now")


def past_instant(value: str) -> datetime:
    """Return a point in time: RFC 3339, or a duration before now."""
    until_now = _timedelta(value)
    if until_now is not None:
        try:
            return datetime.now(timezone.utc) - until_now
        except OverflowError:
            raise click.BadParameter(f"{value} ago is before the year 1") from None
    return _rfc3339(value, "ago")


def _rfc3339(value: str, direction: str) -> datetime:
    from google.protobuf.timestamp_pb2 import Timestamp

    parsed = Timestamp()
    try:
        parsed.FromJsonString(value)
        return parsed.ToDatetime(timezone.utc)
    except (ValueError, OverflowError):
        wanted = f"write 2026-01-31T12:00:00Z, or a duration {direction} such as 10m"
        raise click.BadParameter(f"{value!r} is not a time; {wanted}") from None


def json_object(value: str) -> dict[str, Any]:
    """Return the JSON object in `value`; NaN and infinities are refused."""
    try:
        parsed = json.loads(text(value), parse_constant=_refuse_constant)
        json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise click.BadParameter('is not a JSON object, such as {"rows": 12}')
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def error_code(value: str) -> int:
    """Return a google.rpc.Code, given as its number from 1 to 16 or as its name."""
    from google.rpc.code_pb2 import Code

    codes = dict(Code.items())
    number = codes.get(value.upper().replace("-", "_"))
    if number is None and value.isascii() and value.isdigit():
        number = int(value[:3])
    if number not in codes.values() or not number:
        raise click.BadParameter(f"{value!r} is not a google.rpc.Code: a name such as UNAVAILABLE, or 1 to 16")
    return number


def file_mode(value: str | int) -> int:
    """Return the permissions that are written as an octal number, such as 0660."""
    text = str(value)
    if not re.fullmatch("0?[0-7]{3}", text):
        raise click.BadParameter(f"{text!r} is not a mode; write an octal number such as 0600 or 0660")
    return int(text, 8)


def count(largest: int, *, smallest: int = 0, or_off: bool = False) -> Callable[[str | int], int | None]:
    """Return a parser of whole numbers within these bounds, both included; `or_off` accepts `off`, as None."""

    def parse(value: str | int) -> int | None:
        text = str(value)
        if or_off and text == "off":
            return None
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        if not smallest <= number <= largest:
            raise click.BadParameter(f"{text!r} is not a number from {smallest} to {largest}{', or off' * or_off}")
        return number

    return parse
