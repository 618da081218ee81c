"""The two vocabularies of plain JSON: which one a request is in, and its documents as messages of the API and back."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, get_type_hints

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import vocabularies
from jobstatus_grpc.errors import FieldViolation, InvalidFieldError
from jobstatus_grpc.job import JobState
from jobstatus_grpc.web.http import HttpError, Request
from jobstatus_grpc.wire import convert

TAG_HASH_DIGITS = 12
"""Hexadecimal digits of SHA-256 in a tag: two documents of one revision have the same by chance once in 2**48."""


@dataclass(frozen=True)
class Vocabulary:
    """One API's form of a job."""

    name: str
    """In the query, and as the profile in an Accept header."""
    document: type
    """The TypedDict of its documents."""
    state_field: str
    words: Mapping[JobState, str]
    write: Callable[[Any], Any]
    read: Callable[[object], dict[str, Any]]
    names: Mapping[str, str]
    """The names of its fields that can be written, and those of JobStatus."""

    def states_of(self, word: str) -> list[JobState]:
        """Return the states that a word stands for; empty if there are none."""
        return [state for state, each in self.words.items() if each == word]

    def to_document(self, job: pb.JobStatus) -> dict[str, Any]:
        """Return a job as a document; of one that is deleted only the id is known."""
        if not job.HasField("created_at"):
            return {"id": job.id}
        document: dict[str, Any] = self.write(convert.job_from_wire(job))
        return document

    def to_json(self, job: pb.JobStatus) -> bytes:
        """Return a job as a document in JSON."""
        return dumped(self.to_document(job))

    def tagged(self, job: pb.JobStatus) -> tuple[str, bytes]:
        """Return the tag of a job's document, `REVISION-HASH`, and the document in JSON.

        The revision alone does not tell apart the jobs of two tenants with one id, the two vocabularies, and a job
        before and after its store was restored from a backup. What changes without a new revision, as the time of the
        last heartbeat and the numbers of children, is in no document.
        """
        document = self.to_json(job)
        return f"{job.revision}-{hashlib.sha256(document).hexdigest()[:TAG_HASH_DIGITS]}", document

    def to_message(self, document: object) -> tuple[pb.JobStatus, list[str]]:
        """Return the fields of a document that can be written, and the names of those that it has, null ones too.

        Raises:
            InvalidFieldError: a value has the wrong type, or is not a known word or time.
        """
        known = self.read(document)
        assert isinstance(document, Mapping)
        fields = get_type_hints(self.document)
        if unknown := document.keys() - fields.keys():
            what = f"is no field of the vocabulary {self.name}, which has {', '.join(fields)}"
            raise InvalidFieldError(violations=[FieldViolation(name[:100], what) for name in sorted(unknown)])
        message = pb.JobStatus()
        for name, value in known.items():
            if name == "estimated_completion":
                convert.instant_to_wire(value, message.estimated_completion)
            elif name == "error":
                message.error.CopyFrom(convert.error_to_wire(value))
            elif name not in ("created_at", "updated_at"):
                setattr(message, name, value)
        return message, [field for name, field in self.names.items() if name in document]


TASK_API = Vocabulary(
    name="task",
    document=vocabularies.TaskApiJob,
    state_field="state",
    words=vocabularies.TASK_API_WORDS,
    write=vocabularies.to_task_api,
    read=vocabularies.from_task_api,
    names={"state": "state", "reason": "reason", "hasProgress": "reports_progress", "progress": "progress"},
)

CONTENT_QUEUE = Vocabulary(
    name="content",
    document=vocabularies.ContentQueueJob,
    state_field="status",
    words=vocabularies.CONTENT_QUEUE_WORDS,
    write=vocabularies.to_content_queue,
    read=vocabularies.from_content_queue,
    names={
        "status": "state",
        "progress": "progress",
        "estimatedCompletion": "estimated_completion",
        "error": "error",
    },
)

VOCABULARIES = {each.name: each for each in (TASK_API, CONTENT_QUEUE)}

_PROFILE = re.compile(r";\s*profile\s*=\s*\"?([^\";,\s]+)\"?", re.IGNORECASE)


def vocabulary_of(request: Request, query: Mapping[str, str]) -> Vocabulary:
    """Return the vocabulary that a request names in its query, or in its Accept header as `…; profile=content`.

    Raises:
        HttpError: there is none of this name.
    """
    name = query.get("vocabulary")
    if name is None:
        found = _PROFILE.search(request.header("accept") or "")
        name = TASK_API.name if found is None else found[1]
        if name not in VOCABULARIES:
            raise HttpError(HTTPStatus.NOT_ACCEPTABLE, f"there is no profile {name[:100]}; use {_NAMES}")
    if name not in VOCABULARIES:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"there is no vocabulary {name[:100]}; use {_NAMES}")
    return VOCABULARIES[name]


_NAMES = " or ".join(VOCABULARIES)


def dumped(value: object) -> bytes:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def document_in(body: bytes) -> Mapping[str, Any]:
    """Return the JSON object in a body.

    Raises:
        InvalidFieldError: it has none.
    """
    try:
        document = json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _refusal(f"is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise _refusal("must be a JSON object")
    return document


def _refusal(what: str) -> InvalidFieldError:
    return InvalidFieldError(violations=[FieldViolation("", what)])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return document


@functools.lru_cache(maxsize=128)
def event_of(vocabulary_name: str, message: bytes) -> tuple[int, str, bytes, bool]:
    """Return the type of a WatchJobResponse's event, the tag and the JSON of its job, and whether the job is done.

    Kept, because all watchers of a job are sent the same bytes.
    """
    event = pb.WatchJobResponse.FromString(message).event
    return event.type, *VOCABULARIES[vocabulary_name].tagged(event.job), event.job.done
