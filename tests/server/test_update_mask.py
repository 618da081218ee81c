"""What an update_mask may name, and what it does."""

from __future__ import annotations

import pytest
from google.protobuf import duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

RESULT = struct_pb2.Struct()
RESULT.update({"rows": 1})

# Every writable path: what it is set to, and what it reads as once it is cleared.
WRITABLE = {
    "reason": ("because", ""),
    "reports_progress": (True, False),
    "progress": (12.5, 0.0),
    "estimated_completion": (timestamp_pb2.Timestamp(seconds=2_000_000_000), timestamp_pb2.Timestamp()),
    "error": (pb.JobError(code=8, message="m", reason="R"), pb.JobError()),
    "heartbeat_timeout": (duration_pb2.Duration(seconds=30), duration_pb2.Duration()),
    "labels": ({"a": "b"}, {}),
    "result": (RESULT, struct_pb2.Struct()),
    "trace_parent": ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", ""),
}
REFUSED = [
    *sorted({field.name for field in pb.JobStatus.DESCRIPTOR.fields} - {*WRITABLE, "state"}),
    "", "*", "unknown", "job.reason", "Reason", "reason ", "labels.a", "labels[a]", "error.code", "result.rows",
    "hasProgress", "a" * 5000, "ü😀",
]  # fmt: skip


def test_a_mask_written_in_json_names_a_field_by_its_json_name(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id(), progress=5.0)
    mask = field_mask_pb2.FieldMask()
    mask.FromJsonString(",".join(pb.JobStatus.DESCRIPTOR.fields_by_name[name].json_name for name in WRITABLE))
    cleared = any_service.update(job.id, mask=mask.paths)
    assert {name for name in WRITABLE if getattr(cleared, name) != WRITABLE[name][1]} == set()


@pytest.mark.parametrize("path", WRITABLE)
def test_a_path_in_the_mask_is_set_and_cleared_where_it_is_unset(any_service, new_id, path):
    value, cleared = WRITABLE[path]
    job = any_service.job_in("RETRYING", id=new_id())
    job = any_service.update(job.id, mask=[path], **{path: value})
    assert getattr(job, path) == value
    after = any_service.update(job.id, mask=[path])
    assert (getattr(after, path), after.revision) == (cleared, job.revision + 1)
    assert any_service.get(job.id) == after
    assert path not in {field.name for field, _ in after.ListFields()}


def test_the_state_is_written_where_the_mask_names_it(any_service, new_id):
    job = any_service.create(id=new_id())
    assert any_service.update(job.id, state="JOB_STATE_CANCELLED", mask=["state"]).state == pb.JOB_STATE_CANCELLED


@pytest.mark.parametrize("path", REFUSED)
def test_no_other_path_can_be_written(service, refused, new_id, path):
    job = service.job_in("IN_PROGRESS", id=new_id())
    refusal = refused(service.update, job.id, mask=["reason", path], reason="x", name="n")
    assert (refusal.kind, refusal.fields) == (("INVALID_ARGUMENT", "INVALID_FIELD"), ["update_mask"])
    assert service.get(job.id) == job


@pytest.mark.parametrize("path", REFUSED[:3])
def test_nor_where_the_update_would_create_the_job(service, refused, new_id, path):
    job_id = new_id()
    assert refused(service.update, job_id, mask=[path], allow_missing=True).fields == ["update_mask"]
    assert refused(service.get, job_id).reason == "JOB_NOT_FOUND"


def test_the_state_cannot_be_cleared(service, refused, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id())
    refusal = refused(service.update, job.id, mask=["state", "reason"], reason="x")
    assert (refusal.kind, refusal.fields) == (("INVALID_ARGUMENT", "INVALID_FIELD"), ["job.state"])
    assert service.get(job.id) == job


def test_what_is_set_but_not_in_the_mask_is_not_written(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id(), labels={"old": "1"})
    updated = any_service.update(
        job.id, mask=["reason", "reason"], reason="x", progress=50, labels={"a": "b"}, state="JOB_STATE_SUCCEEDED"
    )
    expected = pb.JobStatus()
    expected.CopyFrom(job)
    expected.reason, expected.revision = "x", job.revision + 1
    expected.updated_at.CopyFrom(updated.updated_at)
    assert updated == expected


def test_without_a_mask_what_is_unset_stays(any_service, new_id):
    fields = {name: value for name, (value, _) in WRITABLE.items() if name != "error"}
    job = any_service.job_in("IN_PROGRESS", id=new_id(), labels={"a": "b"})
    job = any_service.update(job.id, **fields)
    updated = any_service.update(job.id, reason="y")
    for name, value in fields.items():
        assert getattr(updated, name) == ("y" if name == "reason" else value), name


def test_labels_and_result_are_replaced_whole(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id(), labels={"a": "1", "b": "2"}, result={"x": 1, "y": {"z": 2}})
    updated = any_service.update(job.id, labels={"c": "3"}, result={"y": {"w": None}})
    assert dict(updated.labels) == {"c": "3"}
    assert dict(updated.result["y"].items()) == {"w": None}
    assert "x" not in updated.result


def test_clearing_the_progress_keeps_the_bar_and_clearing_the_bar_loses_both(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id(), progress=40.0)
    any_service.update(job.id, progress=40)
    cleared = any_service.update(job.id, mask=["progress"])
    assert (cleared.reports_progress, cleared.HasField("progress")) == (True, False)
    any_service.update(job.id, progress=10)
    none = any_service.update(job.id, mask=["reports_progress"])
    assert (none.reports_progress, none.HasField("progress")) == (False, False)
