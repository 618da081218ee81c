"""The services that callers need a role for, by their descriptors."""

from __future__ import annotations

from google.longrunning import operations_pb2
from google.protobuf.descriptor import ServiceDescriptor
from jobstatus.v1 import job_status_pb2 as pb

JOB_STATUS: ServiceDescriptor = pb.DESCRIPTOR.services_by_name["JobStatusService"]

OPERATIONS: ServiceDescriptor = operations_pb2.DESCRIPTOR.services_by_name["Operations"]

SERVICES = (JOB_STATUS, OPERATIONS)
"""The names of their RPCs are different: roles, counters and the log go by these alone."""

LONG_POLLS = frozenset({"WaitOperation"})
"""The unary RPCs that may last as long as a watch does."""
