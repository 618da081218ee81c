"""`jobstatus delete`: each job by itself."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def is_there(here):
    """Whether a job exists."""
    return lambda job_id: here("get", job_id).returncode == 0


def test_done_jobs_are_deleted_and_their_ids_printed(here, service, is_there):
    ids = [service.job_in(state).id for state in ("SUCCEEDED", "FAILED")]
    done = here("delete", *ids)
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (ids, "", 0)
    assert [is_there(job_id) for job_id in ids] == [False, False]


def test_what_is_refused_does_not_stop_the_others(here, service, is_there):
    ended, running = service.job_in("SUCCEEDED").id, service.job_in("IN_PROGRESS").id
    done = here("delete", "no-such-job", running, "not an id", ended)
    assert (done.stdout, done.returncode) == (f"{ended}\n", 1)
    errors = done.stderr.splitlines()
    assert all(name in error for name, error in zip(["no-such-job", running, "not an id"], errors, strict=True))
    assert (is_there(ended), is_there(running)) == (False, True)


def test_json_has_the_outcome_of_each(here, service):
    ended, running = service.job_in("SUCCEEDED").id, service.job_in("IN_PROGRESS").id
    first, second = map(json.loads, here("delete", ended, running, "--json").stdout.splitlines())
    assert first == {"id": ended, "deleted": True}
    assert (second["id"], second["deleted"], second["error"]["reason"]) == (running, False, "JOB_NOT_DONE")


@pytest.mark.parametrize(("beyond", "code"), [(0, 0), (1, 1)])
def test_a_job_is_deleted_at_the_revision_that_is_named(here, service, is_there, beyond, code):
    job = service.job_in("SUCCEEDED")
    assert here("delete", job.id, "--revision", str(job.revision + beyond)).returncode == code
    assert is_there(job.id) is bool(code)
