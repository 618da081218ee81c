"""Tenants on a server with real tokens: nothing shows that another tenant has a job, and an admin works in each."""

from __future__ import annotations

import re
import urllib.request

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Role
from tests.support.auth import AuthText, Callers, as_unknown
from tests.support.service import update_of
from tests.support.watch_jobs import SYNCED, UPDATED, events_of

NEVER = "no-such-job"


@pytest.fixture(scope="module", params=["native", "grpcio"])
def callers(request, serve_module, tmp_path_factory):
    """`ours` and `theirs`, operators of two tenants of these names, and `admin`, of a third."""
    folder = tmp_path_factory.mktemp("auth")
    auth = AuthText(folder / "auth.toml")
    for tenant in ("ours", "theirs"):
        auth.admit(tenant, tenant=tenant)
    auth.admit("admin", Role.ADMIN, tenant="hq")
    flags = ("--auth", str(auth.path), "--transport", request.param)
    callers = Callers(serve_module(*flags, store=f"sqlite:///{folder}/jobs.db"), auth)
    yield callers
    callers.close()


@pytest.fixture
def ours(callers):
    return callers["ours"]


@pytest.fixture
def theirs(callers):
    return callers["theirs"]


def history(service, job_id, **fields):
    return service.stub.ListJobTransitions(pb.ListJobTransitionsRequest(id=job_id, **fields))


def list_jobs(service, **fields):
    return service.stub.ListJobs(pb.ListJobsRequest(**fields))


def watch_jobs(service, **fields):
    return service.stub.WatchJobs(pb.WatchJobsRequest(**fields), timeout=20)


CALLS = {
    "get": lambda service, job_id: service.get(job_id),
    "history": history,
    "watch": lambda service, job_id: next(service.watch(job_id)),
    "update": lambda service, job_id: service.update(job_id, progress=1),
    "the same end": lambda service, job_id: service.update(job_id, state="JOB_STATE_SUCCEEDED"),
    "another revision": lambda service, job_id: service.update(job_id, expected_revision=99),
    "a known request": lambda service, job_id: service.update(job_id, progress=1, request_id="known"),
    "cancel": lambda service, job_id: service.cancel(job_id),
    "delete": lambda service, job_id: service.stub.DeleteJob(pb.DeleteJobRequest(id=job_id)),
}


@pytest.mark.parametrize("is_removed", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_job_of_another_tenant_is_refused_as_one_that_never_was(ours, theirs, refused, new_id, call, is_removed):
    job_id = new_id()
    theirs.create(id=job_id, state="JOB_STATE_IN_PROGRESS")
    theirs.update(job_id, progress=1, request_id="known")
    job = theirs.update(job_id, state="JOB_STATE_SUCCEEDED")
    if is_removed:
        theirs.stub.DeleteJob(pb.DeleteJobRequest(id=job_id))
    refusal = refused(CALLS[call], ours, job_id)
    assert refusal.kind == ("NOT_FOUND", "JOB_NOT_FOUND")
    assert as_unknown(refusal, job_id) == as_unknown(refused(CALLS[call], ours, NEVER), NEVER)
    assert is_removed or theirs.get(job_id) == job


def test_a_batch_does_not_reach_it(ours, theirs, new_id):
    job = theirs.create(id=new_id())
    results = ours.batch(update_of(job.id, reason="x"), update_of(NEVER, reason="x"))
    assert [result.error.reason for result in results] == ["JOB_NOT_FOUND"] * 2
    assert theirs.get(job.id) == job


def test_ids_and_request_ids_of_tenants_have_nothing_to_do_with_each_other(ours, theirs, new_id):
    job_id, request_id = new_id(), new_id()
    created = [service.create(id=job_id, name=name) for service, name in ((ours, "our"), (theirs, "their"))]
    assert [service.get(job_id).name for service in (ours, theirs)] == [job.name for job in created]
    assert ours.create(request_id=request_id).id != theirs.create(request_id=request_id).id
    ours.update(job_id, state="JOB_STATE_SUCCEEDED", request_id=request_id)
    assert theirs.update(job_id, reason="x", request_id=request_id).revision == 2


def test_lists_have_no_jobs_of_another_tenant_not_even_children(ours, theirs, new_id):
    parent = theirs.create(id=new_id())
    child = ours.create(id=new_id(), parent_id=parent.id)
    theirs.create(id=new_id(), parent_id=parent.id)
    of_parent = list_jobs(ours, filter=pb.JobFilter(parent_id=parent.id)).jobs
    assert [job.id for job in of_parent] == [child.id]
    assert not list_jobs(ours, filter=pb.JobFilter(ids=[parent.id])).jobs


def test_tokens_are_for_one_tenant(ours, theirs, refused, new_id):
    job_id = new_id()
    for service in (ours, theirs):
        service.job_in("SUCCEEDED", id=job_id)
        service.create(id=new_id())
    page, entries = list_jobs(theirs, page_size=1), history(theirs, job_id, page_size=1)
    calls = [
        lambda: list_jobs(ours, page_size=1, page_token=page.next_page_token),
        lambda: next(watch_jobs(ours, resume_token=page.resume_token)),
        lambda: history(ours, job_id, page_size=1, page_token=entries.next_page_token),
    ]
    assert {refused(call).kind for call in calls} == {("INVALID_ARGUMENT", "INVALID_TOKEN")}


def test_a_watch_of_all_jobs_has_those_of_its_tenant_and_only_they_stall(ours, theirs, new_id):
    fields = {"state": "JOB_STATE_IN_PROGRESS", "heartbeat_timeout": {"seconds": 1}}
    stream = watch_jobs(ours, resume_token=list_jobs(ours).resume_token)
    job_id = new_id()
    theirs.create(id=job_id, **fields)
    theirs.create(id=new_id(), **fields)
    created = ours.create(id=job_id, **fields)
    seen = []
    for message in stream:
        seen += message.events
        if seen[-1].job.stalled:
            break
    stream.cancel()
    assert {event.job.id for event in seen} == {"", job_id}
    assert [event.type for event in seen if event.job.id] == [UPDATED, UPDATED]
    assert seen[-1].job.created_at == created.created_at


@pytest.mark.parametrize("tenant", ["ours", "theirs", "hq", "not-yet-used"])
def test_an_admin_works_in_the_tenant_that_it_names(callers, tenant, new_id):
    admin = callers.in_tenant("admin", tenant)
    job = admin.job_in("SUCCEEDED", id=new_id())
    assert [entry.actor for entry in history(admin, job.id).transitions] == ["admin"] * 3
    if tenant in ("ours", "theirs"):
        assert callers[tenant].get(job.id) == job
    assert admin.stub.GetCallerIdentity(pb.GetCallerIdentityRequest()).identity.tenant == tenant
    admin.stub.DeleteJob(pb.DeleteJobRequest(id=job.id))


def test_an_admin_that_names_none_is_in_its_own_and_sees_no_other(callers, theirs, refused, new_id):
    job = theirs.create(id=new_id())
    assert refused(callers["admin"].get, job.id).kind == ("NOT_FOUND", "JOB_NOT_FOUND")
    stream = watch_jobs(callers.in_tenant("admin", "theirs"))
    assert job.id in [event.job.id for message in until_synced(stream) for event in message.events]
    stream.cancel()


def until_synced(stream):
    for message in stream:
        yield message
        if SYNCED in [kind for kind, _ in events_of(message)]:
            return


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_no_other_role_may_name_a_tenant_not_its_own(callers, refused, name):
    assert callers.in_tenant(name, name).stub.GetCallerIdentity(pb.GetCallerIdentityRequest()).identity.tenant == name
    for tenants in (("hq",), ("",), ("not one",), (name, "hq")):
        refusal = refused(callers.in_tenant(name, *tenants).get, NEVER)
        assert refusal.kind == ("PERMISSION_DENIED", "NOT_ALLOWED")


@pytest.mark.parametrize("tenants", [("",), ("two words",), ("x" * 129,), ("ours", "theirs")])
def test_an_admin_names_one_tenant(callers, refused, tenants):
    refusal = refused(callers.in_tenant("admin", *tenants).get, NEVER)
    assert (refusal.kind, set(refusal.fields)) == (("INVALID_ARGUMENT", "INVALID_FIELD"), {"x-jobstatus-tenant"})


def test_metrics_name_no_tenant_and_no_job(serve, tmp_path, new_id):
    auth = AuthText(tmp_path / "auth.toml")
    auth.admit("acme-ci", tenant="acme")
    log = tmp_path / "log"
    flags = ("--auth", str(auth.path), "--metrics", "127.0.0.1:0", "--log-format", "text")
    callers = Callers(serve(*flags, log=log), auth)
    job = callers["acme-ci"].create(id=f"secret-{new_id()}", name="secret name")
    (url,) = re.findall(r"http://\S+/metrics", log.read_text())
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    callers.close()
    assert 'jobstatus_jobs{state="pending"} 1.0' in text
    assert not [word for word in ("acme", job.id, job.name) if word in text]
