"""Whole commands against the limits: every violation is reported, and nothing else."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from jobstatus_grpc.job import (
    CREATION_STATES,
    WRITABLE_FIELDS,
    Cancel,
    Create,
    Delete,
    JobError,
    JobState,
    RequestId,
    Update,
    validation,
)
from jobstatus_grpc.job.model import ERROR_STATES

BAD_REQUEST = RequestId("\0", "hash")
BAD: dict[str, Any] = {
    "reason": "\0",
    "progress": float("nan"),
    "heartbeat_timeout": timedelta(0),
    "labels": {"k": "\0"},
    "result": {"x": float("inf")},
}
BAD_FIELDS = {"job.reason", "job.progress", "job.heartbeat_timeout", "job.labels['k']", "job.result"}


def fields_of(check, command):
    violations: validation.Violations = []
    check(command, violations)
    return [violation.field for violation in violations]


def test_a_create_without_anything_is_valid():
    assert fields_of(validation.check_create, Create(id="")) == []


def test_all_violations_of_a_create_are_reported():
    command = Create(id="/", name="\0", parent_id="/", state=JobState.FAILED, request=BAD_REQUEST, **BAD)
    others = {"job.id", "job.name", "job.parent_id", "job.state", "request_id"}
    assert sorted(fields_of(validation.check_create, command)) == sorted(BAD_FIELDS | others)


@pytest.mark.parametrize("state", list(JobState))
def test_a_job_is_created_in_a_state_that_begins(state):
    is_fine = state in CREATION_STATES
    assert fields_of(validation.check_create, Create(id="a", state=state)) == ([] if is_fine else ["job.state"])


def test_all_violations_of_an_update_are_reported():
    error = JobError(17, "\0", "\0")
    changes = {**BAD, "state": 99, "error": error, "name": "x", "no such field": None}
    command = Update(id="/", changes=changes, attempt=-1, expected_revision=-1, request=BAD_REQUEST)
    others = ["job.id", "request_id", "attempt", "expected_revision", "job.state", "update_mask", "update_mask"]
    others += ["job.error.code", "job.error.message", "job.error.reason"]
    assert sorted(fields_of(validation.check_update, command)) == sorted([*BAD_FIELDS, *others])


def test_clearing_is_valid_for_all_but_the_state():
    empty = {"reason": "", "reports_progress": False, "labels": {}}
    for name in WRITABLE_FIELDS:
        expected = ["job.state"] if name == "state" else []
        command = Update(id="a", changes={name: empty.get(name)})
        assert fields_of(validation.check_update, command) == expected, name


@pytest.mark.parametrize("state", list(JobState))
def test_an_error_is_valid_beside_a_state_that_has_one(state):
    command = Update(id="a", changes={"state": state, "error": JobError(3)})
    expected = [] if state in ERROR_STATES else ["job.error"]
    assert fields_of(validation.check_update, command) == expected


def test_name_and_parent_are_looked_at_only_where_they_may_be_written():
    bad: dict[str, Any] = {"name": "\0", "parent_id": "/", "labels_if_missing": {"k": "\0"}}
    assert fields_of(validation.check_update, Update(id="a", **bad)) == []
    fields = fields_of(validation.check_update, Update(id="a", allow_missing=True, **bad))
    assert fields == ["job.name", "job.parent_id", "job.labels['k']"]


def test_labels_that_are_written_either_way_are_reported_once():
    labels = {"k": "\0"}
    command = Update(id="a", changes={"labels": dict(labels)}, allow_missing=True, labels_if_missing=labels)
    assert fields_of(validation.check_update, command) == ["job.labels['k']"]


def test_all_violations_of_a_cancel_or_a_delete_are_reported():
    cancel = Cancel(id="", reason="\0", request=BAD_REQUEST)
    assert fields_of(validation.check_cancel, cancel) == ["id", "reason", "request_id"]
    assert fields_of(validation.check_delete, Delete(id="", expected_revision=-1)) == ["id", "expected_revision"]
