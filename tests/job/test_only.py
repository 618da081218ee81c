"""Callers that are limited to some jobs: the others do not exist for them, and they cannot move a job out or in."""

from __future__ import annotations

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Cancel, Create, Delete, JobFilter, RequestId, Tombstone, Update, apply, evolve
from jobstatus_grpc.job.ids import derived_job_id
from tests.support.jobs import LATER, RETENTION, S, job_in

CORE = JobFilter(labels={"team": "core"}, name_prefix="core-")
REQUEST = RequestId("r", "hash")
OURS = evolve(job_in(S.IN_PROGRESS), {"name": "core-1", "labels": {"team": "core", "zone": "eu"}})
UNSEEN = {
    "another label": evolve(OURS, {"labels": {"team": "web"}}),
    "no label": evolve(OURS, {"labels": {}}),
    "another name": evolve(OURS, {"name": "web-1"}),
    "a job that knows the request": evolve(OURS, {"labels": {}, "creation_request": REQUEST, "requests": (REQUEST,)}),
    "a job that knows another request": evolve(OURS, {"labels": {}, "requests": (RequestId("r", "other"),)}),
    "a done job": evolve(job_in(S.SUCCEEDED), {"labels": {"team": "web"}}),
    "a removed job": Tombstone("default", "a", 7),
}
COMMANDS = {
    "an update": Update(id="a", changes={"progress": 1.0}),
    "an update with a request": Update(id="a", changes={"progress": 1.0}, request=REQUEST),
    "a heartbeat": Update(id="a"),
    "a claim": Update(id="a", changes={"state": S.IN_PROGRESS}, attempt=7),
    "the same end": Update(id="a", changes={"state": S.SUCCEEDED}),
    "another end": Update(id="a", changes={"state": S.FAILED}),
    "another revision": Update(id="a", expected_revision=99),
    "a label that would let it in": Update(id="a", changes={"labels": {"team": "core"}}),
    "a cancel": Cancel(id="a", request=REQUEST),
    "a forced cancel": Cancel(id="a", force=True),
    "a delete": Delete(id="a"),
    "a delete of another revision": Delete(id="a", expected_revision=99),
}
CREATIONS = {
    "a create": Create(id="a", name="core-1", labels={"team": "core"}),
    "a create with a request": Create(id="a", name="core-1", labels={"team": "core"}, request=REQUEST),
    "an update": Update(id="a", allow_missing=True, name="core-1", labels_if_missing={"team": "core"}),
    "an update with a request": Update(
        id="a", allow_missing=True, name="core-1", labels_if_missing={"team": "core"}, request=REQUEST
    ),
}


def of_core(command):
    return (
        command._replace(only=CORE) if isinstance(command, Update) else type(command)(**fields_of(command), only=CORE)
    )


def fields_of(command):
    return {name: getattr(command, name) for name in command.__slots__ if name != "only"}


def do(found, command):
    return apply(found, of_core(command), now=LATER, retention=RETENTION)


def refusal_of(found, command):
    with pytest.raises(errors.JobStatusError) as caught:
        do(found, command)
    return type(caught.value), caught.value.message, caught.value.metadata


@pytest.mark.parametrize("found", UNSEEN)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_job_that_a_caller_does_not_see_is_refused_as_one_that_never_was(found, command):
    refusal = refusal_of(UNSEEN[found], COMMANDS[command])
    assert refusal == refusal_of(None, COMMANDS[command])
    assert refusal[0] is errors.JobNotFoundError


@pytest.mark.parametrize("found", UNSEEN)
@pytest.mark.parametrize("command", CREATIONS)
def test_an_id_that_is_taken_unseen_says_no_more_than_that(found, command):
    _, message, metadata = refusal = refusal_of(UNSEEN[found], CREATIONS[command])
    assert refusal == refusal_of(Tombstone("default", "a", 7), CREATIONS["a create"])
    assert (message, metadata) == ("job 'a' exists, or did within the last 24 hours", {"id": "a"})


@pytest.mark.parametrize("command", CREATIONS)
def test_a_job_that_carries_the_limits_is_created(command):
    assert CORE.matches(do(None, CREATIONS[command]).job)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({}, "the label team=core and a name that begins with 'core-'"),
        ({"name": "core-1", "labels": {"team": "web"}}, "the label team=core"),
        ({"name": "web-1", "labels": {"team": "core"}}, "a name that begins with 'core-'"),
    ],
)
@pytest.mark.parametrize("found", [None, UNSEEN["no label"]], ids=["free", "taken"])
def test_a_job_without_them_is_refused_with_what_is_missing_whether_its_id_is_taken_or_not(found, fields, missing):
    by_update = Update(
        id="a", allow_missing=True, name=fields.get("name", ""), labels_if_missing=fields.get("labels", {})
    )
    for command in (Create(id="a", **fields), by_update):
        kind, message, _ = refusal_of(found, command)
        assert kind is errors.PermissionDeniedError
        assert message.endswith(f"job 'a' needs {missing}")


@pytest.mark.parametrize("labels", [{}, {"team": "web"}, {"zone": "eu"}])
def test_an_update_cannot_move_a_job_out(labels):
    kind, message, _ = refusal_of(OURS, Update(id="a", changes={"labels": labels}))
    assert (kind, "the label team=core" in message) == (errors.PermissionDeniedError, True)


def test_an_update_that_leaves_the_limits_alone_is_free():
    assert do(OURS, Update(id="a", changes={"labels": {"team": "core"}})).job.labels == {"team": "core"}
    assert do(OURS, Cancel(id="a")).job.cancel_requested
    assert do(evolve(OURS, {"state": S.FAILED}), Delete(id="a")).removed


def test_callers_with_different_limits_may_use_the_same_request_id():
    ids = [derived_job_id("t", "r", only) for only in (None, CORE, JobFilter(name_prefix="core-"))]
    assert len(set(ids)) == 3
    assert ids[1] == derived_job_id("t", "r", JobFilter(name_prefix="core-", labels={"team": "core"}))
