"""Each field and each RPC of the API is on every surface: stores, tokens, wire, service, clients, commands, docs.

The names come from the descriptors and the dataclasses, so that these tests name what a new field or RPC lacks, and the
file that lacks it. CONTRIBUTING.md lists the files to change.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from datetime import datetime, timedelta, timezone

import click
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import AsyncJobStatusClient, JobStatusClient, JobUpdate
from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.cli import COMMANDS, jobstatus
from jobstatus_grpc.cli.options import FILTER_ARGUMENTS
from jobstatus_grpc.errors import InvalidFieldError
from jobstatus_grpc.job import (
    CREATION_FIELDS,
    QUIET_FIELDS,
    REPORT_FIELDS,
    URGENT_FIELDS,
    WRITABLE_FIELDS,
    Job,
    JobFilter,
    apply,
)
from jobstatus_grpc.job.validation import Violations
from jobstatus_grpc.server.access import LEAST_ROLES
from jobstatus_grpc.server.requests import to_create
from jobstatus_grpc.server.servicer import JobStatusServicer
from jobstatus_grpc.server.services import JOB_STATUS
from jobstatus_grpc.server.tokens import filter_scope
from jobstatus_grpc.service import JobService
from jobstatus_grpc.wire import convert
from tests.support.comments import comments_of, names_of
from tests.support.samples import creation, fill
from tests.support.servers import ServerProcess

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


def flags_of(command: str) -> set[str | None]:
    found = jobstatus.get_command(click.Context(jobstatus), command)
    assert found is not None
    return {parameter.name for parameter in found.params}


# The fields of JobFilter

FILTER_FIELDS = names_of(pb.JobFilter)


def test_a_filter_has_the_same_fields_in_python_as_in_the_api():
    difference = set(FILTER_FIELDS) ^ {field.name for field in fields(JobFilter)}
    assert not difference, f"only one of protos/ and job/filter.py has JobFilter.{difference}"


@pytest.mark.parametrize("name", FILTER_FIELDS)
def test_a_filter_field_is_converted_both_ways(name):
    message = fill(pb.JobFilter(), name)
    violations: Violations = []
    job_filter = convert.filter_from_wire(message, violations)
    assert not violations
    assert job_filter != JobFilter(), f"filter_from_wire in wire/convert.py does not read JobFilter.{name}"
    assert convert.filter_to_wire(job_filter) == message, f"filter_to_wire in wire/convert.py drops JobFilter.{name}"


@pytest.mark.parametrize("field", fields(JobFilter), ids=lambda field: field.name)
def test_a_token_is_valid_only_with_the_same_value_of_a_filter_field(field):
    job_filter = JobFilter()
    object.__setattr__(job_filter, field.name, frozenset({1}))
    is_in = filter_scope("tenant", job_filter) != filter_scope("tenant", JobFilter())
    assert is_in, f"filter_scope in server/tokens.py ignores JobFilter.{field.name}: its page tokens fit other filters"


@pytest.mark.parametrize("command", ["list", "watch", "relay"])
@pytest.mark.parametrize("name", FILTER_FIELDS)
def test_a_filter_field_has_a_flag(command, name):
    has_flag = FILTER_ARGUMENTS.get(name, name) in flags_of(command)
    assert has_flag, f"`jobstatus {command}` has no flag for JobFilter.{name}: _FILTER_FLAGS in cli/options.py"


@pytest.mark.parametrize("method", ["list", "list_all", "watch_jobs"])
@pytest.mark.parametrize("client", [AsyncJobStatusClient, JobStatusClient])
def test_a_client_takes_a_whole_filter(client, method):
    assert "JobFilter" in str(inspect.signature(getattr(client, method)).parameters["filter"].annotation)


# The fields of JobStatus

NOT_AT_CREATION = {"error": "a new job has no error"}
"""The fields that a caller can set, but not at creation: why not, as the violation says."""

COMMENTS = comments_of(pb.JobStatus)
SETTABLE = [name for name, comment in COMMENTS.items() if not comment.startswith("Output only")]


def test_a_job_has_the_same_fields_in_python_as_in_the_api():
    stored_only = {"tenant", "creation_request", "requests", "first_progress", "first_progress_at"}
    missing = [name for name in COMMENTS if not hasattr(Job, name) and name not in Job.__dataclass_fields__]
    assert not missing, f"Job in job/model.py has no {missing}"
    unknown = Job.__dataclass_fields__.keys() - COMMENTS.keys() - stored_only
    assert not unknown, f"JobStatus in protos/ has no {unknown}"


def test_every_field_of_a_job_is_converted_both_ways():
    message = fill(pb.JobStatus())
    written = pb.JobStatus()
    convert.job_to_wire(convert.job_from_wire(message), written)
    lost = [name for name in COMMENTS if getattr(written, name) != getattr(message, name)]
    assert not lost, f"job_to_wire or job_from_wire in wire/convert.py drops JobStatus.{lost}"


@pytest.mark.parametrize("name", [name for name in SETTABLE if name not in NOT_AT_CREATION])
def test_a_job_is_created_with_each_field_that_is_not_output_only(name):
    request = pb.CreateJobRequest(job=fill(pb.JobStatus(), name))
    created = apply(None, to_create(request, Identity("test")), now=NOW, retention=timedelta(days=1)).job
    written = pb.JobStatus()
    convert.job_to_wire(created, written)
    is_kept = getattr(written, name) == getattr(request.job, name)
    reason = f"CreateJob ignores JobStatus.{name}: add it to Create in job/commands.py, or to NOT_AT_CREATION here"
    assert is_kept, f"{reason}, or mark it as output only in protos/"


@pytest.mark.parametrize("name", NOT_AT_CREATION)
def test_create_refuses_each_other_field(name):
    with pytest.raises(InvalidFieldError) as caught:
        to_create(pb.CreateJobRequest(job=fill(pb.JobStatus(), name)), Identity("test"))
    assert (f"job.{name}", NOT_AT_CREATION[name]) in [
        (each.field, each.description) for each in caught.value.violations
    ]


def test_the_fields_of_a_creation_are_named_in_the_api():
    (comment,) = (text for name, text in comments_of(pb.CreateJobRequest).items() if name == "job")
    missing = [name for name in CREATION_FIELDS if not re.search(rf"\b{name}\b", comment)]
    assert not missing, f"the comment of CreateJobRequest.job in protos/ does not name {missing}"


@pytest.mark.parametrize("client", [AsyncJobStatusClient, JobStatusClient])
@pytest.mark.parametrize("name", sorted(CREATION_FIELDS))
def test_the_clients_create_takes_each_field_of_a_creation(client, name):
    has_argument = {name, f"{name}_seconds"} & inspect.signature(client.create).parameters.keys()
    assert has_argument, f"create has no argument {name}: client/aio.py, then make sync"


def test_the_clients_create_sends_each_field_of_a_creation():
    values = creation()
    seconds = values["heartbeat_timeout"].total_seconds()
    given = {name: value for name, value in values.items() if name != "heartbeat_timeout"}
    with ServerProcess() as server, JobStatusClient(server.address) as client:
        created = client.create(**given, heartbeat_timeout_seconds=seconds)
    lost = [name for name, value in values.items() if getattr(created, name) != value]
    assert not lost, f"create in client/aio.py does not send {lost}"


@pytest.mark.parametrize("name", sorted(CREATION_FIELDS))
def test_the_command_create_has_a_flag_for_each_field_of_a_creation(name):
    assert name in flags_of("create"), f"`jobstatus create` has no flag for {name}: cli/commands/jobs.py"


def test_a_field_that_an_update_can_change_is_written_by_the_stores():
    constant = WRITABLE_FIELDS - {*REPORT_FIELDS, *URGENT_FIELDS, *QUIET_FIELDS}
    assert not constant, f"none of REPORT_FIELDS, URGENT_FIELDS and QUIET_FIELDS in job/model.py has {constant}"


@pytest.mark.parametrize("name", sorted(WRITABLE_FIELDS))
def test_an_update_writes_each_writable_field(name):
    assert {name, f"{name}_seconds"} & JobUpdate.__dataclass_fields__.keys(), (
        f"JobUpdate in client/requests.py has no {name}"
    )
    flags = {"error": "error_message"}
    assert flags.get(name, name) in flags_of("update"), f"`jobstatus update` has no flag for {name}"


# The RPCs

RPCS = [method.name for method in JOB_STATUS.methods]
METHODS = {"ListJobTransitions": "transitions", "WatchJobs": "watch_jobs"}
CLIENT_METHODS = {"ListJobTransitions": "history", "WatchJobs": "watch_jobs", "GetCallerIdentity": "whoami"}
COMMANDS_OF = {"ListJobTransitions": "history", "BatchUpdateJobs": "update", "GetCallerIdentity": "whoami"}
"""The names that are not the verb of the RPC."""

WITHOUT_JOBS = {"GetCallerIdentity"}
"""The RPCs that the servicer answers by itself."""


def verb_of(rpc: str) -> str:
    """Return the name of an RPC without its noun: `batch_update` for BatchUpdateJobs."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", re.sub("Jobs?$", "", rpc)).lower()


@pytest.mark.parametrize("rpc", RPCS)
def test_an_rpc_has_a_method_of_the_servicer_and_of_the_service(rpc):
    assert hasattr(JobStatusServicer, rpc), f"JobStatusServicer in server/servicer.py has no {rpc}"
    method = METHODS.get(rpc, verb_of(rpc))
    is_there = hasattr(JobService, method) or rpc in WITHOUT_JOBS
    assert is_there, f"JobService in service.py has no {method} for {rpc}"


@pytest.mark.parametrize("client", [AsyncJobStatusClient, JobStatusClient])
@pytest.mark.parametrize("rpc", RPCS)
def test_an_rpc_has_a_method_of_the_clients(rpc, client):
    method = CLIENT_METHODS.get(rpc, verb_of(rpc))
    assert hasattr(client, method), f"{client.__name__} has no {method} for {rpc}: client/aio.py, then make sync"


@pytest.mark.parametrize("rpc", RPCS)
def test_an_rpc_has_a_command(rpc):
    command = COMMANDS_OF.get(rpc, verb_of(rpc))
    assert command in COMMANDS, f"COMMANDS in cli/__init__.py has no {command} for {rpc}"


def test_every_rpc_is_in_the_documentation(root):
    table = (root / "docs" / "api.md").read_text().partition("## The calls")[2].partition("\n## ")[0]
    rows = set(re.findall(r"^\| (\w+) \|", table, re.MULTILINE)) - {"RPC"}
    assert rows == set(RPCS), f"the table of calls in docs/api.md and protos/ differ in {rows ^ set(RPCS)}"


def test_the_roles_in_the_documentation_are_those_of_the_server(root):
    section = (root / "docs" / "security.md").read_text().partition("### Roles")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| (\w+(?:, \w+)*) \|(.*)\|$", section, re.MULTILINE)[1:]
    documented = {rpc: Role(len(Role) + 1 - marks.count("✓")) for rpcs, marks in rows for rpc in rpcs.split(", ")}
    assert documented == LEAST_ROLES


def test_every_command_is_in_the_documentation(root):
    verbs = re.search(r"`jobstatus (serve \|.*?)`", (root / "docs" / "command-line.md").read_text(), re.DOTALL)
    assert verbs is not None
    difference = {verb.strip() for verb in verbs[1].split("|")} ^ COMMANDS.keys()
    assert not difference, f"docs/command-line.md and COMMANDS in cli/__init__.py differ in {difference}"
