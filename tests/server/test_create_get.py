"""CreateJob and GetJob."""

from __future__ import annotations

import time
import uuid

import pytest
from google.protobuf import duration_pb2, struct_pb2, timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

RESULT = struct_pb2.Struct()
RESULT.update({"rows": 3.5, "url": "https://example.org", "tags": ["a", None, True, [], {}], "deep": {"er": {"": "ü"}}})

CHOSEN = {
    "name": "größe ✓ 日本",
    "reason": "line 1\n\tline 2",
    "reports_progress": True,
    "progress": 12.5,
    "estimated_completion": timestamp_pb2.Timestamp(seconds=1_893_456_000, nanos=123_456_000),
    "heartbeat_timeout": duration_pb2.Duration(seconds=90, nanos=500_000_000),
    "labels": {"team": "ml", "empty": "", "ключ": "значение"},
    "parent_id": "A.parent_of:this-1",
    "result": RESULT,
}


def test_a_new_job_is_pending_at_revision_1(any_service, new_id):
    job = any_service.create(id=new_id(), name="backup")
    assert (job.state, job.revision, job.attempt, job.done) == (pb.JOB_STATE_PENDING, 1, 0, False)
    assert job.created_at == job.updated_at
    assert {field.name for field, _ in job.ListFields()} == {
        "id", "name", "state", "created_at", "updated_at", "revision",
    }  # fmt: skip


def test_a_job_can_be_created_in_progress_which_begins_attempt_1(any_service, new_id):
    job = any_service.create(id=new_id(), state="JOB_STATE_IN_PROGRESS", progress=3)
    assert (job.state, job.attempt, job.started_at) == (pb.JOB_STATE_IN_PROGRESS, 1, job.created_at)
    assert (job.reports_progress, job.progress) == (True, 3)


@pytest.mark.parametrize("state", [3, 4, 5, 6, 7, 8, 99, -1, 2**31 - 1])
def test_a_job_is_created_in_no_other_state(service, refused, new_id, state):
    job_id = new_id()
    assert refused(service.create, id=job_id, state=state).fields == ["job.state"]
    assert refused(service.get, job_id).kind == ("NOT_FOUND", "JOB_NOT_FOUND")


def test_what_the_creator_chose_is_what_everybody_reads(any_service, new_id):
    job = any_service.create(id=new_id(), **CHOSEN)
    for name, value in CHOSEN.items():
        assert getattr(job, name) == value, name
    assert any_service.get(job.id) == job


def test_what_only_the_service_sets_is_ignored_at_creation(any_service, new_id):
    forged = timestamp_pb2.Timestamp(seconds=1)
    instants = ("created_at", "updated_at", "started_at", "finished_at", "expires_at", "projected_completion")
    plain = any_service.create(id=new_id())
    job = any_service.create(
        id=new_id(),
        done=True,
        attempt=7,
        cancel_requested=True,
        stalled=True,
        revision=9,
        **dict.fromkeys(instants, forged),
    )
    assert [field.name for field, _ in job.ListFields()] == [field.name for field, _ in plain.ListFields()]
    assert (job.revision, job.created_at.seconds > 1) == (1, True)


def test_a_generated_id_is_a_uuid_of_version_7(any_service):
    before = time.time_ns() // 1_000_000
    ids = [any_service.create().id for _ in range(20)]
    after = time.time_ns() // 1_000_000
    for text in ids:
        made = uuid.UUID(text)
        assert (str(made), made.version, made.variant) == (text, 7, uuid.RFC_4122)
        assert before <= made.int >> 80 <= after
    assert len(set(ids)) == 20


def test_an_id_derived_from_a_request_id_is_a_uuid_of_version_8(any_service, new_id):
    request_id = new_id()
    made = uuid.UUID(any_service.create(request_id=request_id).id)
    assert (made.version, made.variant) == (8, uuid.RFC_4122)
    assert any_service.create(request_id=request_id).id == str(made)
    assert any_service.create(request_id=new_id()).id != str(made)


def test_a_retried_create_answers_with_the_job_as_it_is_now(any_service, new_id):
    for job_id in (new_id(), ""):
        request_id = new_id()
        job = any_service.create(id=job_id, name="a", labels={"b": "1", "a": "2"}, request_id=request_id)
        now = any_service.update(job.id, state="JOB_STATE_IN_PROGRESS", attempt=1)
        again = any_service.create(id=job_id, name="a", labels={"a": "2", "b": "1"}, request_id=request_id)
        assert again == now


def test_a_request_id_of_a_create_is_not_for_another_payload(any_service, refused, new_id):
    request_id = new_id()
    job = any_service.create(name="a", request_id=request_id)
    refusal = refused(any_service.create, name="b", request_id=request_id)
    assert refusal.kind == ("INVALID_ARGUMENT", "REQUEST_ID_REUSED")
    assert any_service.get(job.id) == job


def test_a_taken_id_is_refused(any_service, refused, new_id):
    job = any_service.create(id=new_id(), name="mine")
    for request_id in ("", new_id()):
        refusal = refused(any_service.create, id=job.id, name="yours", request_id=request_id)
        assert refusal.kind == ("ALREADY_EXISTS", "JOB_ALREADY_EXISTS")
        assert refusal.metadata == {"id": job.id}
    assert any_service.get(job.id) == job


def test_an_unknown_job_is_not_found_never_pending(any_service, refused, new_id):
    job_id = new_id()
    refusal = refused(any_service.get, job_id)
    assert refusal.kind == ("NOT_FOUND", "JOB_NOT_FOUND")
    assert (refusal.domain, refusal.metadata) == ("jobstatus.v1", {"id": job_id})
    assert job_id in refusal.message


def test_every_reply_is_the_job_as_it_is_read(any_service, new_id):
    job = any_service.create(id=new_id(), **CHOSEN)
    for fields in ({"state": "JOB_STATE_IN_PROGRESS", "attempt": 1}, {"progress": 40.0}, {"state": "JOB_STATE_FAILED"}):
        job = any_service.update(job.id, **fields)
        assert any_service.get(job.id) == job


def test_jobs_outlive_their_server_on_sqlite(serve, tmp_path, new_id):
    service = serve(store=f"sqlite:///{tmp_path}/jobs.db")
    jobs = [service.job_in(state, id=new_id(), **CHOSEN) for state in ("PENDING", "IN_PROGRESS", "RETRYING", "FAILED")]
    assert service.process.terminate() == 0
    service.process.start()
    assert [service.get(job.id) for job in jobs] == jobs


def test_a_replay_is_known_across_a_restart_on_sqlite(serve, tmp_path, new_id):
    service = serve(store=f"sqlite:///{tmp_path}/jobs.db")
    created = service.create(request_id="create-1")
    claimed = service.update(created.id, state="JOB_STATE_IN_PROGRESS", attempt=1, request_id="claim-1")
    service.process.restart()
    assert service.create(request_id="create-1") == claimed
    assert service.update(created.id, state="JOB_STATE_IN_PROGRESS", attempt=1, request_id="claim-1") == claimed
