"""What callers sent and received, an entry for each call: recorded by workload.py, judged by checker.py.

As text, a history is one JSON object per line, with messages in the JSON of protobuf. Any program may write it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import json_format, message_factory
from google.protobuf.message import Message
from jobstatus.v1 import job_status_pb2 as pb

_METHODS = pb.DESCRIPTOR.services_by_name["JobStatusService"].methods_by_name

_REFUSALS = frozenset(
    {
        "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION", "ABORTED", "UNIMPLEMENTED", "UNAUTHENTICATED",
    }
)  # fmt: skip
"""Codes of calls that have written nothing. After others, such as UNAVAILABLE, the client does not know."""


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """A call or a stream. Times are in seconds, on one clock that does not jump."""

    number: int
    """Unique in the history."""
    server: str
    method: str
    """The name of the RPC."""
    request: Any
    started_at: float
    ended_at: float = math.inf
    """Infinite: it had not ended when the history was written."""
    responses: list[tuple[float, Any]] = field(default_factory=list)
    """Each message with the time when it was received; at most one of a unary call."""
    code: str = ""
    """The name of the gRPC code; "" if the client ended the call itself, or it had not ended."""
    reason: str = ""
    """The reason in the ErrorInfo of the domain jobstatus.v1."""
    message: str = ""
    """Of the error, for people."""

    @property
    def response(self) -> Any:
        """The response of a unary call that succeeded, else None."""
        return self.responses[0][1] if self.responses and self.code == "OK" else None

    @property
    def is_refused(self) -> bool:
        """Whether the call has certainly written nothing."""
        return self.code in _REFUSALS


def write(entries: Iterable[Entry], path: Path) -> None:
    """Write a history as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(to_json(entry)) + "\n")


def read(path: Path) -> list[Entry]:
    """Read a history.

    Raises:
        ValueError: a line is not an entry; the message names the line.
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8") as file:
        return list(_entries(file, path))


def to_json(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON values."""
    values = {
        "number": entry.number,
        "server": entry.server,
        "method": entry.method,
        "request": json_format.MessageToDict(entry.request),
        "started_at": entry.started_at,
        "ended_at": None if entry.ended_at == math.inf else entry.ended_at,
        "responses": [{"at": at, "message": json_format.MessageToDict(message)} for at, message in entry.responses],
        "code": entry.code,
        "reason": entry.reason,
        "message": entry.message,
    }
    return {name: value for name, value in values.items() if value not in ("", None)}


def from_json(values: Mapping[str, Any]) -> Entry:
    """Return the entry in JSON values; raise ValueError, KeyError or TypeError if they are none."""
    method = _METHODS[values["method"]]
    responses = [
        (float(item["at"]), _message(method.output_type, item["message"])) for item in values.get("responses", ())
    ]
    ended_at = values.get("ended_at")
    return Entry(
        number=int(values["number"]),
        server=str(values.get("server", "")),
        method=method.name,
        request=_message(method.input_type, values["request"]),
        started_at=float(values["started_at"]),
        ended_at=math.inf if ended_at is None else float(ended_at),
        responses=responses,
        code=str(values.get("code", "")),
        reason=str(values.get("reason", "")),
        message=str(values.get("message", "")),
    )


def _entries(lines: Iterable[str], path: Path) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield from_json(json.loads(line))
            except (KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}, line {number}: not an entry of a history") from None
            except (ValueError, json_format.Error) as error:
                raise ValueError(f"{path}, line {number}: not an entry of a history: {error}") from None


def _message(descriptor: Any, values: dict[str, Any]) -> Message:
    message: Message = message_factory.GetMessageClass(descriptor)()
    # A server of a newer version may send fields that are not known here.
    return json_format.ParseDict(values, message, ignore_unknown_fields=True)
