"""ListJobs: what the service adds. The filters themselves are in the stores' contract."""

from __future__ import annotations

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

INVALID_TOKEN = ("INVALID_ARGUMENT", "INVALID_TOKEN")


def page_of(service, parent, **fields) -> pb.ListJobsResponse:
    request = pb.ListJobsRequest(filter=pb.JobFilter(parent_id=parent), **fields)
    return service.stub.ListJobs(request, timeout=20)


def pages_of(service, parent, *, page_token="", **fields) -> list[pb.ListJobsResponse]:
    """All pages; only `next_page_token` says whether another follows."""
    pages = [page_of(service, parent, page_token=page_token, **fields)]
    while pages[-1].next_page_token:
        pages.append(page_of(service, parent, page_token=pages[-1].next_page_token, **fields))
    return pages


@pytest.fixture
def family(any_service, new_id):
    """A parent's id, and those of its 7 parts, the newest first."""
    parent = new_id()
    return parent, [any_service.create(id=new_id(), parent_id=parent).id for _ in range(7)][::-1]


def test_jobs_come_newest_first_page_by_page(any_service, family):
    parent, ids = family
    pages = pages_of(any_service, parent, page_size=3)
    assert [job.id for page in pages for job in page.jobs] == ids
    assert max(len(page.jobs) for page in pages) == 3


def test_a_listed_job_is_the_whole_job(any_service, new_id):
    job = any_service.job_in("FAILED", id=new_id(), parent_id=(parent := new_id()), labels={"a": "b"})
    assert list(page_of(any_service, parent).jobs) == [any_service.get(job.id)]


def test_pages_are_stable_while_jobs_are_added(any_service, family, new_id):
    parent, ids = family
    first = page_of(any_service, parent, page_size=3)
    any_service.create(id=new_id(), parent_id=parent)
    rest = pages_of(any_service, parent, page_size=3, page_token=first.next_page_token)
    assert [job.id for page in rest for job in page.jobs] == ids[3:]


def test_a_filter_that_matches_nothing_gives_one_empty_page(any_service, new_id):
    page = page_of(any_service, new_id())
    assert (list(page.jobs), page.next_page_token) == ([], "")
    assert page.resume_token


@pytest.mark.parametrize(("asked", "given"), [(0, 50), (60, 60), (5000, 1000)])
def test_a_page_holds_50_jobs_unless_asked_and_1000_at_most(serve, asked, given):
    service = serve()
    for first in range(0, 1100, 500):
        ids = [f"{number}" for number in range(first, min(first + 500, 1100))]
        service.batch(*(pb.UpdateJobRequest(job=pb.JobStatus(id=job_id), allow_missing=True) for job_id in ids))
    page = service.stub.ListJobs(pb.ListJobsRequest(page_size=asked), timeout=20)
    assert len(page.jobs) == given
    assert page.next_page_token


def test_a_page_ends_at_1_mib_and_misses_nothing(any_service, new_id):
    parent = new_id()
    result = {"text": "x" * 60_000}
    ids = [any_service.create(id=new_id(), parent_id=parent, result=result).id for _ in range(25)][::-1]
    pages = pages_of(any_service, parent, page_size=1000)
    assert [job.id for page in pages for job in page.jobs] == ids
    assert [len(page.jobs) for page in pages] == [18, 7]
    assert max(page.ByteSize() for page in pages) < 1024 * 1024 + 65_000


def test_every_page_gives_the_resume_token_from_before_the_first(any_service, family, new_id):
    parent, _ = family
    first = page_of(any_service, parent, page_size=4)
    any_service.create(id=new_id())
    second = page_of(any_service, parent, page_size=4, page_token=first.next_page_token)
    assert second.resume_token == first.resume_token != page_of(any_service, parent).resume_token


def test_a_token_is_for_its_own_filter_only(any_service, family, refused, new_id):
    parent, _ = family
    token = page_of(any_service, parent, page_size=3).next_page_token
    other = pb.ListJobsRequest(filter=pb.JobFilter(parent_id=new_id()), page_token=token)
    assert refused(any_service.stub.ListJobs, other).kind == INVALID_TOKEN


GARBAGE = {
    "cut": lambda token: token[:-1],
    "longer": lambda token: token + "A",
    "not base64": lambda token: "é",
    "huge": lambda token: "A" * 1_000_000,
    "in lower case": str.lower,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_no_token(any_service, family, refused, kind):
    parent, _ = family
    token = GARBAGE[kind](page_of(any_service, parent, page_size=3).next_page_token)
    request = pb.ListJobsRequest(filter=pb.JobFilter(parent_id=parent), page_token=token)
    assert refused(any_service.stub.ListJobs, request).kind == INVALID_TOKEN


def test_a_resume_token_is_no_page_token(any_service, family, refused):
    parent, _ = family
    token = page_of(any_service, parent).resume_token
    request = pb.ListJobsRequest(filter=pb.JobFilter(parent_id=parent), page_token=token)
    assert refused(any_service.stub.ListJobs, request).kind == INVALID_TOKEN


def test_every_violation_of_a_request_is_reported_at_once(service, refused):
    job_filter = pb.JobFilter(ids=["a b"], names=["\0"], name_prefix="x" * 300, parent_id="/", labels={"": ""})
    job_filter.states.append(99)  # type: ignore[arg-type]
    job_filter.created_after.nanos = -1
    refusal = refused(service.stub.ListJobs, pb.ListJobsRequest(filter=job_filter, page_size=-1))
    names = ["ids", "names", "states", "name_prefix", "labels['']", "parent_id", "created_after"]
    assert refusal.fields == [*(f"filter.{name}" for name in names), "page_size"]


def test_done_and_stalled_are_filters_of_three_values(any_service, new_id):
    parent = new_id()
    states = ("PENDING", "IN_PROGRESS", "SUCCEEDED")
    ids = {state: any_service.job_in(state, id=new_id(), parent_id=parent).id for state in states}
    for job_filter, expected in (
        (pb.JobFilter(done=True), states[2:]),
        (pb.JobFilter(done=False), states[:2]),
        (pb.JobFilter(stalled=True), ()),
        (pb.JobFilter(stalled=False), states),
        (pb.JobFilter(), states),
    ):
        job_filter.parent_id = parent
        request = pb.ListJobsRequest(filter=job_filter)
        found = {job.id for job in any_service.stub.ListJobs(request, timeout=20).jobs}
        assert found == {ids[state] for state in expected}


def test_bytes_that_are_no_request_are_refused(service):
    with pytest.raises(grpc.RpcError) as caught:
        service.send("ListJobs", b"\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
