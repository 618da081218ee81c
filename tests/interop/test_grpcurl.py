"""A job's life with grpcurl alone: no .proto at hand, nothing of ours installed."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.rpc import code_pb2

GRPCURL = Path(sys.executable).with_name("grpcurl")
SERVICE = "jobstatus.v1.JobStatusService"
DEADLINE_SECONDS = 20

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="PyPI has grpcurl for Linux on x86-64 only"
)


def grpcurl(service, *verb, flags=()):
    command = [GRPCURL, "-plaintext", "-max-time", str(DEADLINE_SECONDS), *flags, service.address, *verb]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_SECONDS)


def call(service, method, **request):
    """Call, and return the replies."""
    done = grpcurl(service, f"{SERVICE}/{method}", flags=["-d", json.dumps(request)])
    assert (done.returncode, done.stderr) == (0, "")
    return list(objects_in(done.stdout))


def objects_in(text):
    """Read JSON objects that stand behind each other."""
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        yield value
        text = text[end:]


def refused(service, method, **request):
    """Call, and return the code and the details of the refusal by their types."""
    done = grpcurl(service, f"{SERVICE}/{method}", flags=["-format-error", "-d", json.dumps(request)])
    assert done.returncode > 64
    error = json.loads(done.stderr)
    assert error["code"] == done.returncode - 64
    return error["code"], {detail["@type"].rpartition(".")[2]: detail for detail in error["details"]}


def test_the_service_is_listed_and_described_with_its_comments(service):
    assert SERVICE in grpcurl(service, "list").stdout.split()
    described = grpcurl(service, "describe", SERVICE).stdout
    for method in ("CreateJob", "UpdateJob", "WatchJob", "WatchJobs", "DeleteJob", "ListJobTransitions"):
        assert f"rpc {method} (" in described
    assert "// Follows one job to its end: a SNAPSHOT at once" in described


def test_a_template_of_a_request_can_be_had(service):
    described = grpcurl(service, "describe", "jobstatus.v1.UpdateJobRequest", flags=["-msg-template"]).stdout
    assert '"expectedRevision"' in described
    assert '"updateMask"' in described
    assert "// Above 0: must equal the job's revision" in described


def test_a_job_is_created_claimed_updated_and_read(service, new_id):
    job_id = new_id()
    (created,) = call(service, "CreateJob", job={"id": job_id, "name": "backup", "labels": {"team": "ops"}})
    assert created["job"]["state"] == "JOB_STATE_PENDING"
    (claimed,) = call(service, "UpdateJob", job={"id": job_id, "state": "JOB_STATE_IN_PROGRESS"}, attempt=1)
    assert (claimed["job"]["attempt"], claimed["job"]["revision"]) == (1, "2")
    result = {"rows": 3, "tables": ["a", None, {"b": True}]}
    call(service, "UpdateJob", job={"id": job_id, "progress": 42.5, "result": result}, attempt=1)
    masked = {"job": {"id": job_id}, "update_mask": {"paths": ["labels", "result"]}, "attempt": 1}
    (cleared,) = call(service, "UpdateJob", **masked)
    assert not {"labels", "result"} & cleared["job"].keys()
    (read,) = call(service, "GetJob", id=job_id)
    assert read == cleared
    assert (read["job"]["progress"], read["job"]["hasProgress"]) == (42.5, True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", read["job"]["projectedCompletion"])


def test_a_watch_shows_the_job_until_its_end(service, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id(), progress=1.0)
    request = json.dumps({"id": job.id, "min_update_interval": "0s"})
    arguments = [GRPCURL, "-plaintext", "-max-time", str(DEADLINE_SECONDS), "-d", request, service.address]
    with subprocess.Popen([*arguments, f"{SERVICE}/WatchJob"], stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        line = watch.stdout.readline()
        service.update(job.id, progress=50)
        service.update(job.id, state="JOB_STATE_SUCCEEDED", attempt=1)
        messages = list(objects_in(line + watch.stdout.read()))
    assert watch.returncode == 0
    assert messages[0]["event"]["type"] == "JOB_EVENT_TYPE_SNAPSHOT"
    assert {message["event"]["type"] for message in messages[1:]} == {"JOB_EVENT_TYPE_UPDATED"}
    end = messages[-1]["event"]["job"]
    assert (end["state"], end["progress"], end["done"]) == ("JOB_STATE_SUCCEEDED", 100, True)


def test_a_batch_and_a_cancel_are_calls_like_others(service, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id())
    updates = [{"job": {"id": job.id, "reason": "x"}}, {"job": {"id": "unknown"}}]
    (batch,) = call(service, "BatchUpdateJobs", updates=updates)
    assert batch["results"][0]["job"]["reason"] == "x"
    assert batch["results"][1]["error"]["reason"] == "JOB_NOT_FOUND"
    (cancelled,) = call(service, "CancelJob", id=job.id, reason="enough")
    assert cancelled["job"]["cancelRequested"]


def test_why_a_call_was_refused_is_readable(service, new_id):
    job = service.job_in("SUCCEEDED", id=new_id())
    code, details = refused(service, "UpdateJob", job={"id": job.id, "state": "JOB_STATE_IN_PROGRESS"})
    assert code == code_pb2.FAILED_PRECONDITION
    assert details["ErrorInfo"]["reason"] == "ILLEGAL_TRANSITION"
    assert details["ErrorInfo"]["metadata"]["from"] == "JOB_STATE_SUCCEEDED"
    code, details = refused(service, "GetJob", id=new_id())
    assert (code, details["ErrorInfo"]["reason"]) == (code_pb2.NOT_FOUND, "JOB_NOT_FOUND")


def test_every_violation_is_readable(service):
    code, details = refused(service, "CreateJob", job={"id": "/", "progress": 101, "name": "a\nb", "labels": {"": ""}})
    assert code == code_pb2.INVALID_ARGUMENT
    violations = details["BadRequest"]["field_violations"]
    assert {violation["field"] for violation in violations} == {"job.id", "job.progress", "job.name", "job.labels['']"}
    assert all(violation["description"] for violation in violations)


@pytest.mark.parametrize("character", ["x", "😀"])
def test_very_many_violations_are_readable(service, character):
    labels = {f"{number:02}{character * 61}": "\t" for number in range(64)}
    code, details = refused(service, "CreateJob", job={"labels": labels})
    assert (code, details["ErrorInfo"]["reason"]) == (code_pb2.INVALID_ARGUMENT, "INVALID_FIELD")
    assert len(details["BadRequest"]["field_violations"]) > 3


def test_an_enum_that_the_api_lacks_does_not_leave_grpcurl(service):
    done = grpcurl(service, f"{SERVICE}/CreateJob", flags=["-d", '{"job": {"state": "JOB_STATE_DONE"}}'])
    assert done.returncode != 0
    assert "JOB_STATE_DONE" in done.stderr


def test_health_can_be_asked(service):
    for name in ("", SERVICE, f"{SERVICE}/write"):
        done = grpcurl(service, "grpc.health.v1.Health/Check", flags=["-d", json.dumps({"service": name})])
        assert json.loads(done.stdout) == {"status": "SERVING"}
