"""google.longrunning.Operations: each job as an operation `jobs/{id}`, for Google's clients.

A view of the jobs, not a second kind of thing: the roles, limits, errors and page tokens are those of JobStatusService.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import timedelta

from google.longrunning import operations_pb2
from google.protobuf import any_pb2, struct_pb2
from google.rpc import code_pb2, status_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Identity
from jobstatus_grpc.errors import FieldViolation, InvalidFieldError
from jobstatus_grpc.job import Cancel, Delete, Job, JobError, JobFilter, JobState, limits, to_state, validation
from jobstatus_grpc.job.validation import Violations
from jobstatus_grpc.server import requests, responses
from jobstatus_grpc.server.requests import JobsQuery, parse
from jobstatus_grpc.server.transports.interface import CallContext
from jobstatus_grpc.service import JobService
from jobstatus_grpc.wire import convert

COLLECTION = "jobs"

MAX_FILTER_CHARACTERS = 4096

MAX_RESPONSE_SECONDS = 0.5
"""Of the time until a call's deadline, kept for the response of a wait: a tenth, and at most this."""


class OperationsServicer:
    """Answers google.longrunning.Operations; the middleware turns its errors into gRPC status."""

    def __init__(self, service: JobService) -> None:
        self._service = service

    async def GetOperation(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Return a job as an operation."""
        job_id = job_id_of(parse(operations_pb2.GetOperationRequest, data).name)
        return operation_of(await self._service.get(caller.tenant, job_id, only=caller.only))

    async def ListOperations(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Return a page of jobs as operations."""
        query = to_query(parse(operations_pb2.ListOperationsRequest, data), caller)
        position, page = await self._service.list(
            caller.tenant, query.filter, limit=query.limit, cursor=query.cursor, position=query.position
        )
        parts, next_cursor = await responses.fitting_part(page, operation_of)
        end = operations_pb2.ListOperationsResponse(next_page_token=responses.page_token(query, position, next_cursor))
        if "unreachable" in end.DESCRIPTOR.fields_by_name:  # older googleapis-common-protos do not have it
            end.unreachable.extend(f"{COLLECTION}/{error.metadata.get('id', '-')}" for error in page.damaged)
        return b"".join((*parts, end.SerializeToString()))

    async def WaitOperation(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Return a job as an operation once it is done, or as it is when the time is over."""
        request = parse(operations_pb2.WaitOperationRequest, data)
        job_id, timeout_seconds = job_id_of(request.name), timeout_of(request)
        left = context.time_remaining()
        if left is not None:
            timeout_seconds = min(timeout_seconds, left - min(left / 10, MAX_RESPONSE_SECONDS))
        job = await self._service.wait(caller.tenant, job_id, timeout_seconds=timeout_seconds, only=caller.only)
        return operation_of(job)

    async def CancelOperation(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Request the end of a job."""
        job_id = job_id_of(parse(operations_pb2.CancelOperationRequest, data).name)
        await self._service.cancel(Cancel(id=job_id, tenant=caller.tenant, actor=caller.principal, only=caller.only))
        return b""

    async def DeleteOperation(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Remove a done job."""
        job_id = job_id_of(parse(operations_pb2.DeleteOperationRequest, data).name)
        await self._service.delete(Delete(id=job_id, tenant=caller.tenant, actor=caller.principal, only=caller.only))
        return b""


def job_id_of(name: str) -> str:
    """Return the id of the job that an operation is.

    Raises:
        InvalidFieldError: it is no name of an operation.
    """
    collection, _, job_id = name.partition("/")
    violations: Violations = []
    if collection != COLLECTION:
        violations.append(FieldViolation("name", f"must be {COLLECTION}/ and the id of a job"))
    else:
        validation.check_id(job_id, "name", violations)
    if violations:
        raise InvalidFieldError(violations=violations)
    return job_id


def timeout_of(request: operations_pb2.WaitOperationRequest) -> float:
    """Return how long a wait may last, in seconds; as long as a watch may if the request does not say.

    Raises:
        InvalidFieldError: it is negative, or no duration.
    """
    longest = limits.MAX_WATCH_INTERVAL
    if not request.HasField("timeout"):
        return longest.total_seconds()
    try:
        timeout = convert.duration_from_wire(request.timeout)
    except ValueError as error:
        raise InvalidFieldError(violations=[FieldViolation("timeout", str(error))]) from None
    if timeout < timedelta(0):
        raise InvalidFieldError(violations=[FieldViolation("timeout", "must not be negative")])
    return min(timeout, longest).total_seconds()


def to_query(request: operations_pb2.ListOperationsRequest, caller: Identity) -> JobsQuery:
    """Return the query.

    Raises:
        InvalidFieldError: of the collection, the filter or the size of the page.
        InvalidTokenError: the page token was made for another filter.
    """
    violations: Violations = []
    if request.name not in ("", COLLECTION):
        violations.append(FieldViolation("name", f"must be {COLLECTION}, or empty"))
    job_filter = read_filter(request.filter, violations)
    return requests.jobs_query(job_filter, request.page_size, request.page_token, caller, violations)


FILTER_TEXT = (
    'must be comparisons with = joined by AND, such as done = false AND metadata.labels.team = "core"; the fields are '
    "done, metadata.state, metadata.stalled, metadata.name, metadata.parent_id and metadata.labels.KEY"
)

# Not in a text without quotes: the operators and the wildcard of AIP-160, which are not supported.
_OTHER = r"""[^\s="()!<>~,'*]"""

_QUOTED = r'"(?:[^"\\*]|\\.)*"'

_COMPARISON = re.compile(rf"((?:(?!:){_OTHER})+(?:(?<=\.){_QUOTED})?)\s*=\s*({_QUOTED}|{_OTHER}+)(?:\s+AND\s+(?=\S)|$)")


def read_filter(text: str, violations: Violations) -> JobFilter:
    """Return a filter in the syntax of AIP-160, of which this is a part; add a violation for what it cannot say."""
    if len(text) > MAX_FILTER_CHARACTERS:
        violations.append(FieldViolation("filter", f"must have at most {MAX_FILTER_CHARACTERS} characters"))
        return JobFilter()
    text, position, job_filter = text.strip(), 0, JobFilter()
    while position < len(text):
        found = _COMPARISON.match(text, position)
        if found is None:
            violations.append(FieldViolation("filter", f"{FILTER_TEXT}; not understood: {text[position:]!r:.60}"))
            break
        job_filter &= _comparison(found[1], _text(found[2]), violations)
        position = found.end()
    return job_filter


def _text(token: str) -> str:
    """Return what a token is, with or without quotes."""
    return re.sub(r"\\(.)", r"\1", token[1:-1]) if token.startswith('"') else token


def _comparison(path: str, value: str, violations: Violations) -> JobFilter:
    """Return the filter of the jobs whose field at `path` is `value`."""
    message = pb.JobFilter()
    try:
        if path.startswith(_LABEL) and path != _LABEL:
            message.labels[_text(path.removeprefix(_LABEL))] = value
        else:
            _FIELDS[path](message, value)
    except KeyError:
        violations.append(FieldViolation("filter", f"{FILTER_TEXT}; there is no field {path!r:.60}"))
    except ValueError as error:
        violations.append(FieldViolation("filter", f"{path}: {error}"))
    return convert.filter_from_wire(message, violations)


_LABEL = "metadata.labels."


def _to_bool(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"must be true or false, is {value!r:.60}")
    return value == "true"


def _to_parent(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")  # to the service that is no criterion: all jobs match
    return value


_FIELDS: Mapping[str, Callable[[pb.JobFilter, str], None]] = {
    "done": lambda message, value: setattr(message, "done", _to_bool(value)),
    "metadata.stalled": lambda message, value: setattr(message, "stalled", _to_bool(value)),
    "metadata.state": lambda message, value: message.states.append(to_state(value)),  # type: ignore[arg-type]
    "metadata.name": lambda message, value: message.names.append(value),
    "metadata.parent_id": lambda message, value: setattr(message, "parent_id", _to_parent(value)),
}


def operation_of(job: Job) -> bytes:
    """Return a job as the bytes of an Operation; its metadata is the JobStatus."""
    operation = operations_pb2.Operation(
        name=f"{COLLECTION}/{job.id}",
        metadata=any_pb2.Any(type_url=_type_url(pb.JobStatus.DESCRIPTOR.full_name), value=responses.render_job(job)),
        done=job.done,
    )
    if job.state is JobState.SUCCEEDED:
        result = convert.result_to_wire(job.result or {})
        operation.response.type_url = _type_url(struct_pb2.Struct.DESCRIPTOR.full_name)
        operation.response.value = result.SerializeToString()
    elif job.done:
        operation.error.CopyFrom(_status_of(job))
    return operation.SerializeToString()


def _type_url(name: str) -> str:
    return f"type.googleapis.com/{name}"


def _status_of(job: Job) -> status_pb2.Status:
    """Return why a job did not succeed: the code of its state, or of its error if it failed, and the first text."""
    error = job.error or JobError(limits.UNKNOWN_CODE)
    code = _CODES.get(job.state, error.code)
    text = error.message or job.reason or job.cancel_reason or f"the job was {job.state.word}"
    return status_pb2.Status(code=code, message=text)


_CODES: Mapping[JobState, int] = {
    JobState.ABORTED: code_pb2.ABORTED,
    JobState.CANCELLED: code_pb2.CANCELLED,
}
