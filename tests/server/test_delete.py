"""DeleteJob."""

from __future__ import annotations

import pytest
from jobstatus.v1 import job_status_pb2 as pb


def delete(service, job_id, **fields):
    return service.stub.DeleteJob(pb.DeleteJobRequest(id=job_id, **fields), timeout=20)


@pytest.mark.parametrize("state", ["SUCCEEDED", "ABORTED", "FAILED", "CANCELLED"])
def test_a_done_job_is_deleted_with_its_history(any_service, new_id, refused, state):
    job = any_service.job_in(state, id=new_id())
    assert delete(any_service, job.id) == pb.DeleteJobResponse()
    history = pb.ListJobTransitionsRequest(id=job.id)
    assert refused(any_service.get, job.id).kind == ("NOT_FOUND", "JOB_EXPIRED")
    assert refused(any_service.stub.ListJobTransitions, history).kind == ("NOT_FOUND", "JOB_EXPIRED")


@pytest.mark.parametrize("state", ["PENDING", "IN_PROGRESS", "RETRYING"])
def test_a_job_that_is_not_done_stays(any_service, new_id, refused, state):
    job = any_service.job_in(state, id=new_id())
    assert refused(delete, any_service, job.id).kind == ("FAILED_PRECONDITION", "JOB_NOT_DONE")
    assert any_service.get(job.id) == job


def test_the_id_of_a_deleted_job_is_not_free(any_service, new_id, refused):
    job = any_service.job_in("SUCCEEDED", id=new_id())
    delete(any_service, job.id)
    assert refused(any_service.create, id=job.id).kind == ("ALREADY_EXISTS", "JOB_ALREADY_EXISTS")
    assert refused(delete, any_service, job.id).kind == ("NOT_FOUND", "JOB_EXPIRED")


def test_an_unknown_job_cannot_be_deleted(any_service, new_id, refused):
    assert refused(delete, any_service, new_id()).kind == ("NOT_FOUND", "JOB_NOT_FOUND")


def test_another_revision_than_expected_stays(any_service, new_id, refused):
    job = any_service.job_in("SUCCEEDED", id=new_id())
    refusal = refused(delete, any_service, job.id, expected_revision=job.revision - 1)
    assert refusal.kind == ("ABORTED", "REVISION_MISMATCH")
    delete(any_service, job.id, expected_revision=job.revision)


def test_a_deleted_job_is_in_no_list(any_service, new_id):
    job = any_service.job_in("FAILED", id=new_id(), parent_id=(parent := new_id()))
    delete(any_service, job.id)
    request = pb.ListJobsRequest(filter=pb.JobFilter(parent_id=parent))
    assert not any_service.stub.ListJobs(request, timeout=20).jobs


def test_all_violations_of_a_request_are_reported_at_once(service, refused):
    assert refused(delete, service, "a b", expected_revision=-1).fields == ["id", "expected_revision"]
