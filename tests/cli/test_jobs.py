"""`jobstatus create`, `get`, `update` and `cancel`, and what all commands have in common."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
from google.protobuf import json_format
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.cli import COMMANDS


def test_a_job_is_created_as_it_was_described(here):
    job = here.json(
        "create", "--name", "backup", "--label", "team=core", "--label", "q=a=b", "--parent", "p",
        "--reason", "nightly",
        "--heartbeat-timeout", "30s", "--eta", "2099-01-31T12:00:00Z", "--result", '{"rows": 12}', "--reports-progress",
    )  # fmt: skip
    expected = {
        "name": "backup", "labels": {"team": "core", "q": "a=b"}, "parentId": "p", "reason": "nightly",
        "heartbeatTimeout": "30s", "estimatedCompletion": "2099-01-31T12:00:00Z", "result": {"rows": 12.0},
        "hasProgress": True, "state": "JOB_STATE_PENDING", "attempt": 0,
    }  # fmt: skip
    assert {name: job[name] for name in expected} == expected


@pytest.mark.parametrize("flags", [["--in-progress"], ["--state", "in-progress"]])
def test_a_job_may_begin_at_once(here, flags):
    assert here.json("create", *flags)["attempt"] == 1


def test_create_prints_only_the_id_where_that_is_asked_for(here, service):
    job_id = here("create", "--name", "backup", "--quiet").stdout.removesuffix("\n")
    assert service.get(job_id).name == "backup"


def test_a_request_id_makes_a_job_once(here, new_id):
    ids = {here.json("create", "--request-id", f"once-{here.address}")["id"] for _ in range(2)}
    assert len(ids) == 1


def test_json_is_the_job_as_protobuf_has_it_in_one_line(here, service):
    job = service.job_in("FAILED", name="übung", progress=42.5, labels={"a": "b"})
    done = here("get", job.id, "--json")
    assert done.stdout.count("\n") == 1
    assert json_format.Parse(done.stdout, pb.JobStatus()) == job


def test_json_has_every_field_that_is_not_a_message_whether_set_or_not(here, service, new_id):
    job = here.json("get", service.create(id=new_id()).id)
    scalars = {"id", "name", "state", "reason", "hasProgress", "done", "attempt", "stalled"}
    scalars |= {"cancelRequested", "cancelReason"}
    assert scalars | {"revision", "labels", "parentId", "traceParent", "children", "createdAt", "updatedAt"} == set(job)
    assert job["revision"] == "1"


def test_the_summary_names_what_is_known(here, service, new_id):
    job_id = service.create(id=new_id(), name="backup", labels={"a": "b"}).id
    service.update(job_id, state="JOB_STATE_IN_PROGRESS", attempt=1, progress=42.5, reason="one\ntwo\x09three")
    rows = dict(line.split(maxsplit=1) for line in here("get", job_id).stdout.splitlines())
    expected = {
        "id": job_id, "name": "backup", "state": "in_progress", "progress": "42.5%", "reason": "one two three",
        "labels": "a=b", "revision": "2",
    }  # fmt: skip
    assert {name: rows[name] for name in expected} == expected


def test_the_summary_of_a_done_job_leaves_out_what_it_no_longer_awaits(here, new_id):
    flags = ("--reports-progress", "--heartbeat-timeout", "30s")
    open_job = here("create", "--id", (job_id := new_id()), *flags).stdout
    done_job = here("cancel", job_id).stdout
    for row in ("progress   not yet\n", "stalls     after 30s without an update\n"):
        assert row in open_job
        assert row not in done_job


def test_a_quiet_update_prints_nothing(here, service):
    job_id = service.job_in("IN_PROGRESS").id
    done = here("update", job_id, "70", "--quiet")
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert service.get(job_id).progress == 70


def test_update_writes_what_is_given_and_nothing_else(here, service, new_id):
    job_id = service.create(id=new_id(), reason="kept", labels={"a": "b"}).id
    job = here.json("update", job_id, "--state", "in_progress", "--progress", "42%", "--eta", "2099-01-31T12:00:00Z")
    assert (job["state"], job["progress"], job["estimatedCompletion"]) == (
        "JOB_STATE_IN_PROGRESS",
        42.0,
        "2099-01-31T12:00:00Z",
    )
    assert (job["reason"], job["labels"]) == ("kept", {"a": "b"})


def test_update_without_a_flag_is_a_heartbeat(here, service):
    job = service.job_in("IN_PROGRESS")
    assert here.json("update", job.id)["revision"] == str(job.revision)


def test_update_ends_a_job_with_an_error(here, service):
    job_id = service.job_in("IN_PROGRESS").id
    job = here.json(
        "update", job_id, "--state", "failed", "--error-message", "disk full", "--error-code", "resource_exhausted",
        "--error-reason", "NO_SPACE",
    )  # fmt: skip
    assert job["error"] == {"code": 8, "message": "disk full", "reason": "NO_SPACE"}


def test_the_first_thing_that_is_typed_works(here, service):
    job = here.json("create", "nightly backup", "--in-progress")
    assert job["name"] == "nightly backup"
    assert [here.json("update", job["id"], typed)["progress"] for typed in ("40", "40.5%")] == [40, 40.5]
    assert here.json("update", job["id"], "--progress", "50%")["progress"] == 50
    failed = here.json("update", job["id"], "--state", "failed", "--error", "CUDA out of memory")
    assert failed["error"]["message"] == "CUDA out of memory"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["create", "a", "--name", "b"], "NAME contradicts --name"), (["update", "x", "1", "--progress", "2"], "PERCENT")],
)
def test_an_argument_and_the_flag_for_it_are_refused(offline, arguments, says):
    done = offline(*arguments)
    assert (done.returncode, says in done.stderr) == (2, True)


def test_an_argument_wins_over_a_variable(here):
    done = here("create", "mine", "--json", env={"JOBSTATUS_NAME": "another"})
    assert json.loads(done.stdout)["name"] == "mine"


def a_stalled_job(service, new_id):
    job = service.create(id=new_id(), state="JOB_STATE_IN_PROGRESS", heartbeat_timeout={"seconds": 1})
    return next(each.event.job for each in service.watch(job.id) if each.event.job.stalled).id


def test_cancel_says_how_to_end_a_stalled_job(here, service, new_id):
    job_id = a_stalled_job(service, new_id)
    done = here("cancel", job_id)
    assert f"To end it: jobstatus cancel --force {job_id}" in done.stderr
    assert (done.returncode, service.get(job_id).cancel_requested) == (0, True)
    assert here("cancel", "--force", job_id, "--reason", "worker lost").stderr == ""
    job = service.get(job_id)
    assert (job.state, job.reason, job.stalled) == (pb.JOB_STATE_CANCELLED, "worker lost", False)


def test_a_forced_cancel_leaves_a_worker_that_reports_to_end_its_job(here, service):
    job_id = service.job_in("IN_PROGRESS").id
    done = here("cancel", "--force", job_id, "--reason", "too slow")
    assert "\ncancel     too slow\n" in here("get", job_id).stdout
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert (service.get(job_id).cancel_requested, service.get(job_id).done) == (True, False)


def test_a_forced_cancel_of_a_job_without_a_worker_is_a_cancel(here, service, new_id):
    done = here("cancel", "--force", service.create(id=new_id()).id)
    assert (done.returncode, done.stderr) == (0, "")


def test_update_clears_fields(here, service, new_id):
    job_id = service.create(id=new_id(), reason="x", labels={"a": "b"}, heartbeat_timeout={"seconds": 30}).id
    flags = [part for field in ("reason", "label", "heartbeat-timeout", "eta") for part in ("--clear", field)]
    job = here.json("update", job_id, *flags)
    assert (job["reason"], job["labels"], job.get("heartbeatTimeout")) == ("", {}, None)


def test_a_claim_begins_the_next_attempt(here, service):
    job = service.job_in("RETRYING")
    assert here.json("update", job.id, "--claim")["attempt"] == job.attempt + 1


def test_a_claim_that_another_worker_was_faster_with_is_refused(here, service):
    job = service.job_in("IN_PROGRESS")
    done = here("update", job.id, "--claim", "--attempt", str(job.attempt))
    assert done.returncode == 1
    assert "attempt" in done.stderr


def test_update_creates_what_is_missing_where_that_is_asked_for(here, new_id):
    flags = ["--allow-missing", "--claim", "--name", "backup", "--label", "a=b", "--parent", "p"]
    job = here.json("update", new_id(), *flags)
    assert (job["name"], job["labels"], job["parentId"], job["attempt"]) == ("backup", {"a": "b"}, "p", 1)


def test_cancel_ends_a_job_that_no_worker_is_on(here, service, new_id):
    job = here.json("cancel", service.create(id=new_id()).id, "--reason", "not needed")
    assert (job["state"], job["reason"]) == ("JOB_STATE_CANCELLED", "not needed")


def test_cancel_asks_the_worker_of_a_job_that_has_one(here, service):
    assert "(cancel requested)" in here("cancel", service.job_in("IN_PROGRESS").id).stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["get", "no-such-job"], 5),
        (["update", "no-such-job", "--state", "failed"], 5),
        (["get", "not an id"], 2),
        (["create", "--state", "succeeded"], 2),
        (["create", "--label", "team"], 2),
        (["create", "--name", b"\xff"], 2),
        (["update", "x", "--clear", "name"], 2),
        (["update", "x", "--clear", "reason", "--reason", "y"], 2),
        (["update", "x", "--claim", "--state", "failed"], 2),
        (["update", "x", "--attempt", "-1"], 2),
        (["update", "x", "--result", "[]"], 2),
        (["get", "x", "--address", "nowhere"], 2),
        (["get", "x", "--timeout", "soon"], 2),
        (["get", "x", "--cert", __file__], 2),
        (["get", "x", "--ca", "/no/such/file"], 2),
        (["get", "x", "--token", "two words"], 2),
        (["list", "--state", "stuck"], 2),
        (["list", "--limit", "0"], 2),
        (["list", "--limit", "1", "--all"], 2),
        (["list", "--label", "a=b", "--label", "a=c"], 2),
        (["list", "--created-after", "yesterday"], 2),
        (["list", "--parent", "not an id"], 2),
        (["delete", "no-such-job"], 5),
        (["delete", "not an id"], 2),
        (["history", "no-such-job"], 5),
        (["watch", "x", "--state", "failed"], 2),
        (["watch", "--parent", "not an id"], 2),
        (["completion", "tcsh"], 2),
        (["get"], 2),
        (["fetch"], 2),
    ],
)
def test_what_is_refused_is_one_line_and_its_exit_code(here, arguments, code):
    done = here(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "arguments", [["get", "x"], ["watch", "x"], ["watch"], ["list"], ["history", "x"], ["delete", "x", "y"]]
)
def test_a_server_that_is_not_there_is_exit_4(offline, arguments):
    done = offline(*arguments, "--timeout", "0.1s")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert offline.address in done.stderr


def test_flags_win_over_variables(here, offline, service, new_id):
    job_id = service.create(id=new_id()).id
    assert offline("get", job_id, "--address", here.address).returncode == 0
    assert here("get", job_id, env={"JOBSTATUS_TIMEOUT": "soon"}).returncode == 2


def test_a_closed_pipe_is_a_quiet_end(cli, service, new_id, start):
    job_id = service.create(id=new_id()).id
    watch = start("watch", job_id)
    watch.stdout.readline()
    watch.stdout.close()
    service.update(job_id, state="JOB_STATE_IN_PROGRESS")
    service.update(job_id, state="JOB_STATE_SUCCEEDED")
    assert watch.stderr.read() == ""
    assert watch.wait() == 141


@pytest.mark.parametrize(("flags", "says"), [([], "serving"), (["--service", "x"], "service_unknown")])
def test_health_is_printed_and_an_exit_code(here, flags, says):
    done = here("health", *flags)
    assert (done.stdout, done.returncode) == (f"{says}\n", 0 if says == "serving" else 1)


def test_health_is_printed_as_json_where_that_is_asked_for(here):
    assert here.json("health") == {"status": "serving"}


def test_the_health_of_a_server_that_is_not_there_is_exit_4(offline):
    done = offline("health")
    assert (done.stdout, done.stderr.count("\n"), done.returncode) == ("", 1, 4)


def test_the_version_is_printed(here):
    assert here("--version").stdout == f"jobstatus {version('jobstatus-grpc')}\n"


def test_help_names_every_command(here):
    done = here("--help")
    listed = [line.split()[0] for line in done.stdout.partition("Commands:\n")[2].splitlines()]
    assert (tuple(listed), done.stderr, done.returncode) == (tuple(COMMANDS), "", 0)


def test_no_command_is_wrong_usage(here):
    done = here()
    assert (done.stdout, done.returncode) == ("", 2)
    assert "Commands:" in done.stderr
