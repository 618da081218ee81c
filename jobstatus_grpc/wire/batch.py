"""BatchUpdateJobs → commands: each update on its own, also where one of them cannot even be parsed."""

from __future__ import annotations

from collections.abc import Sequence

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import limits
from jobstatus_grpc.commands import Update
from jobstatus_grpc.errors import FieldViolation, InvalidFieldError, JobStatusError
from jobstatus_grpc.wire.requests import Caller, parse, to_update


def to_updates(data: bytes, caller: Caller) -> list[Update | JobStatusError]:
    """Return each update of a BatchUpdateJobsRequest as a command, or as the error that its own call would have got.

    Raises:
        InvalidFieldError: there are too many, or the bytes are no batch.
    """
    updates = _parse_batch(data)
    count = len(updates)
    if count > limits.MAX_BATCH_UPDATES:
        what = f"must be at most {limits.MAX_BATCH_UPDATES} updates, are {count}; send them in several batches"
        raise InvalidFieldError(violations=[FieldViolation("updates", what)])
    commands: list[Update | JobStatusError] = []
    for update in updates:
        try:
            update = parse(pb.UpdateJobRequest, update) if isinstance(update, bytes) else update
            commands.append(to_update(update, caller))
        except InvalidFieldError as error:
            commands.append(error)
    return commands


def _parse_batch(data: bytes) -> Sequence[pb.UpdateJobRequest | bytes]:
    """Return the updates; where the batch cannot be parsed, the bytes of each: one that is bad must not stop others."""
    try:
        return parse(pb.BatchUpdateJobsRequest, data).updates
    except InvalidFieldError:
        bodies: list[bytes] = []
        position = 0
        while position < len(data) and len(bodies) <= limits.MAX_BATCH_UPDATES:
            key, position = _varint(data, position)
            size, position = _varint(data, position)
            if key != _UPDATES_KEY or position + size > len(data):
                raise
            bodies.append(data[position : position + size])
            position += size
        return bodies


# Field 1, length-delimited.
_UPDATES_KEY = 1 << 3 | 2


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a base-128 varint, and the position behind it; 0 where there is none."""
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    return 0, position
