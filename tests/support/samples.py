"""Messages of the API with every field set, made from the descriptors: a field that is added is in them."""

from __future__ import annotations

from typing import Any

from google.protobuf import timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job import CREATION_FIELDS
from jobstatus_grpc.wire import convert

LIMITED = pb.CallerIdentity(
    principal="ci",
    tenant="web",
    role=pb.ROLE_WORKER,
    only=pb.JobFilter(labels={"team": "core"}, name_prefix="core-"),
    expires_at=timestamp_pb2.Timestamp(seconds=100),
    authenticated=True,
)
"""A caller that sees some jobs of its tenant."""

_VALUES = {
    FieldDescriptor.CPPTYPE_BOOL: True,
    FieldDescriptor.CPPTYPE_DOUBLE: 50.0,
    FieldDescriptor.CPPTYPE_ENUM: pb.JOB_STATE_IN_PROGRESS,
    FieldDescriptor.CPPTYPE_INT32: 7,
    FieldDescriptor.CPPTYPE_INT64: 7,
    FieldDescriptor.CPPTYPE_STRING: "sample",
}

_TEXTS = {"trace_parent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
"""The fields that a plain text is refused for."""


def fill(message: Any, *names: str) -> Any:
    """Set these fields of `message`, all if there are none, and return it."""
    descriptor: Descriptor = message.DESCRIPTOR
    for name in names or descriptor.fields_by_name:
        field = descriptor.fields_by_name[name]
        value = getattr(message, name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value["key"] = _VALUES[field.message_type.fields_by_name["value"].cpp_type]
        elif isinstance(value, Message):
            _fill_message(value)
        elif field.is_repeated:
            value.append(_VALUES[field.cpp_type])
        else:
            setattr(message, name, _TEXTS.get(name, _VALUES[field.cpp_type]))
    return message


def _fill_message(message: Any) -> None:
    if message.DESCRIPTOR.full_name == "google.protobuf.Struct":
        message.update({"key": 1.0})
    elif message.DESCRIPTOR.full_name in ("google.protobuf.Timestamp", "google.protobuf.Duration"):
        message.seconds = 100
    else:
        fill(message)


def creation() -> dict[str, Any]:
    """Return a value for each of CREATION_FIELDS, none of them the default."""
    job = convert.job_from_wire(fill(pb.JobStatus()))
    return {name: getattr(job, name) for name in sorted(CREATION_FIELDS)}
