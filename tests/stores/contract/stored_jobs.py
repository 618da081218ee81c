"""Commands that make jobs with every field, which a store must read back unchanged."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from jobstatus_grpc.job import Cancel, Command, Create, JobError, JobState, RequestId, Update
from tests.support.samples import creation
from tests.support.stores import claim, end

S = JobState

LATER = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=timezone.utc)
RESULT: dict[str, Any] = {
    "url": "s3://bücket/ключ",
    "sizes": [1.0, 2.5, -0.0, 1e300, None, True, [], {}],
    'quo"te\\': {"deep": [[{"er": "line\nbreak"}]]},
}
TRACES = [f"00-{number:032x}-{number:016x}-01" for number in (1, 2)]
REQUESTS = [RequestId(f'request "{number}"\\', f"hash,{number}") for number in range(20)]

STORED: dict[str, list[Command]] = {
    "a bare creation": [Create(id="a")],
    "a full creation": [
        Create(
            id="a",
            name="render ☃",
            state=S.IN_PROGRESS,
            reason="first\n\tthen",
            progress=12.5,
            estimated_completion=LATER,
            heartbeat_timeout=timedelta(seconds=1, microseconds=1),
            labels={"team": 'me"dia', "": "ключ"},
            parent_id="parent",
            result=RESULT,
            request=REQUESTS[0],
            actor="someone",
        )
    ],
    "every field of a creation": [Create(**creation() | {"id": "a"})],
    "one request": [Create(id="a"), claim("a", request=REQUESTS[1])],
    "more requests than are kept": [
        Create(id="a", request=REQUESTS[0]),
        *(Update(id="a", changes={"reason": f"{n}"}, request=REQUESTS[n]) for n in range(1, 20)),
    ],
    "an attempt that failed": [
        Create(id="a"),
        claim("a"),
        end("a", S.RETRYING, error=JobError(14, "no answer", "HOST_DOWN"), reason="again"),
    ],
    "a failure": [Create(id="a"), end("a", S.FAILED, error=JobError(13, "böse"))],
    "a success": [Create(id="a", reports_progress=True), claim("a"), end("a", result={"rows": 3.0})],
    "a cancelled job": [Create(id="a"), Cancel(id="a", reason="not needed")],
    "a job asked to stop": [Create(id="a"), claim("a"), Cancel(id="a", actor="someone", request=REQUESTS[2])],
    "cleared fields": [
        Create(id="a", name="n", progress=1.0, labels={"a": "b"}, result={}, heartbeat_timeout=timedelta(seconds=5)),
        Update(id="a", changes={"reports_progress": False, "labels": {}, "result": None, "heartbeat_timeout": None}),
    ],
    "a job made by an update": [
        Update(id="a", allow_missing=True, name="n", labels_if_missing={"a": "b"}, changes={"progress": 3.0})
    ],
    "a job that another trace took over": [
        Create(id="a", trace_parent=TRACES[0], state=S.IN_PROGRESS),
        Update(id="a", changes={"trace_parent": TRACES[1]}),
        Update(id="a", changes={"progress": 3.0}),
    ],
    "a job without its trace": [
        Create(id="a", trace_parent=TRACES[0]),
        Update(id="a", changes={"trace_parent": "", "reason": "r"}),
        Update(id="a", changes={"reason": "s"}),
    ],
    "another tenant's job": [Create(id="a", tenant="other"), Create(id="a", name="mine")],
}
