"""request_id makes the retry of an update safe; allow_missing creates a missing job."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job.ids import new_uuid7

TRACES = [f"00-4bf92f3577b34da6a3ce929d0e0e4736-{number:016x}-01" for number in (1, 2)]


def test_a_replayed_update_has_one_effect_and_answers_with_the_job_as_it_is_now(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    any_service.update(job.id, reason="first", request_id="r")
    now = any_service.update(job.id, reason="second")
    assert any_service.update(job.id, reason="first", request_id="r") == now
    assert any_service.get(job.id) == now


@pytest.mark.parametrize(
    "other",
    [
        {"reason": "b"},
        {"attempt": 1},
        {"expected_revision": 2},
        {"mask": ["reason"]},
        {"name": "x"},
        {"labels": {"a": ""}},
    ],
)
def test_a_request_id_with_another_payload_is_refused(any_service, refused, new_id, other):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    now = any_service.update(job.id, reason="a", request_id="r")
    refusal = refused(any_service.update, job.id, **{"reason": "a", "request_id": "r", **other})
    assert refusal.kind == ("INVALID_ARGUMENT", "REQUEST_ID_REUSED")
    assert refusal.metadata == {"id": job.id, "request_id": "r"}
    assert any_service.get(job.id) == now


def test_labels_in_another_order_are_the_same_payload(any_service, new_id):
    labels = {f"key-{number}": str(number) for number in range(64)}
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    once = any_service.update(job.id, labels=labels, request_id="r")
    assert any_service.update(job.id, labels=dict(reversed(labels.items())), request_id="r") == once


@pytest.mark.parametrize("first", ["", TRACES[0]])
def test_a_replay_in_another_trace_is_the_same_payload(any_service, new_id, first):
    request_id = new_id()
    job = any_service.create(name="a", trace_parent=first, request_id=request_id)
    assert any_service.create(name="a", trace_parent=TRACES[1], request_id=request_id) == job
    mask = ["reason", "trace_parent"] if first else ["reason"]
    now = any_service.update(job.id, reason="a", trace_parent=first, mask=mask, request_id="r")
    again = any_service.update(
        job.id, reason="a", trace_parent=TRACES[1], mask=["reason", "trace_parent"], request_id="r"
    )
    assert again == now


def test_a_request_id_of_one_rpc_is_not_another_rpcs(any_service, refused, new_id):
    job = any_service.create(id=new_id(), request_id="r")
    assert refused(any_service.update, job.id, request_id="r").reason == "REQUEST_ID_REUSED"
    assert refused(any_service.cancel, job.id, request_id="r").reason == "REQUEST_ID_REUSED"


def test_a_request_id_belongs_to_its_job(any_service, new_id):
    jobs = [any_service.job_in("IN_PROGRESS", id=new_id()) for _ in range(2)]
    for job in jobs:
        assert any_service.update(job.id, reason="a", request_id="r").revision == job.revision + 1


def test_a_request_is_known_after_100_others(any_service, update_of, new_id):
    job = any_service.create(id=new_id(), request_id="creation")
    updates = [update_of(job.id, reason=str(number), request_id=f"r{number}") for number in range(100)]
    any_service.batch(*updates)
    last = any_service.get(job.id)
    assert any_service.update(job.id, reason="0", request_id="r0") == last
    assert any_service.create(id=job.id, request_id="creation") == last
    assert [result.job for result in any_service.batch(*updates[1:3])] == [last] * 2


def test_a_request_that_changed_nothing_changes_nothing_later(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id(), reason="a")
    job = any_service.update(job.id, reason="a")
    assert any_service.update(job.id, reason="a", request_id="r") == job
    now = any_service.update(job.id, reason="b")
    assert any_service.update(job.id, reason="a", request_id="r") == now


def test_a_request_id_of_the_day_before_yesterday_is_refused(any_service, refused, new_id):
    job = any_service.create(id=new_id())
    old = new_uuid7(datetime.now(timezone.utc) - timedelta(days=2))
    for call, fields in ((any_service.update, {"reason": "a"}), (any_service.cancel, {})):
        refusal = refused(call, job.id, request_id=old, **fields)
        assert refusal.kind == ("FAILED_PRECONDITION", "REQUEST_ID_TOO_OLD")
    assert refused(any_service.create, id=new_id(), request_id=old).reason == "REQUEST_ID_TOO_OLD"
    assert any_service.get(job.id) == job


def test_a_refused_update_does_not_use_up_its_request_id(any_service, refused, new_id):
    job = any_service.create(id=new_id())
    assert refused(any_service.update, job.id, attempt=5, request_id="r").reason == "STALE_ATTEMPT"
    assert any_service.update(job.id, reason="x", request_id="r").reason == "x"


def test_an_update_sent_alone_is_known_when_it_comes_again_in_a_batch(any_service, update_of, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    once = any_service.update(job.id, reason="a", request_id="r")
    (result,) = any_service.batch(update_of(job.id, reason="a", request_id="r"))
    assert result.job == once


def test_allow_missing_creates_and_updates_as_one_change(any_service, new_id):
    job = any_service.update(
        new_id(), allow_missing=True, name="n", parent_id="p", labels={"a": "b"}, state="JOB_STATE_IN_PROGRESS",
        attempt=1, progress=5, request_id="r",
    )  # fmt: skip
    assert (job.revision, job.attempt, job.progress, job.name, job.parent_id) == (1, 1, 5, "n", "p")
    assert (job.created_at, dict(job.labels)) == (job.updated_at, {"a": "b"})
    assert any_service.get(job.id) == job


def test_allow_missing_takes_name_and_labels_though_the_mask_leaves_them_out(any_service, new_id):
    job = any_service.update(new_id(), allow_missing=True, name="n", labels={"a": "b"}, reason="x", mask=["state"],
                             state="JOB_STATE_SUCCEEDED")  # fmt: skip
    assert (job.name, dict(job.labels), job.reason, job.revision) == ("n", {"a": "b"}, "", 1)


def test_allow_missing_on_a_job_that_exists_is_an_update(any_service, new_id):
    job = any_service.create(id=new_id(), name="mine")
    updated = any_service.update(job.id, allow_missing=True, name="yours", parent_id="q", reason="x")
    assert (updated.name, updated.parent_id, updated.reason, updated.revision) == ("mine", "", "x", 2)


def test_a_replay_of_an_update_that_created_its_job_is_known(any_service, refused, new_id):
    job_id = new_id()
    once = any_service.update(job_id, allow_missing=True, reason="a", request_id="r")
    assert any_service.update(job_id, allow_missing=True, reason="a", request_id="r") == once
    assert refused(any_service.update, job_id, allow_missing=True, reason="b", request_id="r").reason == (
        "REQUEST_ID_REUSED"
    )


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"expected_revision": 1}, ("ABORTED", "REVISION_MISMATCH")),
        ({"state": "JOB_STATE_IN_PROGRESS", "attempt": 2}, ("FAILED_PRECONDITION", "STALE_ATTEMPT")),
        ({"attempt": 1}, ("FAILED_PRECONDITION", "STALE_ATTEMPT")),
        ({"error": pb.JobError(code=3)}, ("INVALID_ARGUMENT", "INVALID_FIELD")),
    ],
)
def test_allow_missing_forgives_nothing_else(any_service, refused, new_id, fields, kind):
    job_id = new_id()
    assert refused(any_service.update, job_id, allow_missing=True, **fields).kind == kind
    assert refused(any_service.get, job_id).kind == ("NOT_FOUND", "JOB_NOT_FOUND")
