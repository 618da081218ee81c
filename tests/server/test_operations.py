"""google.longrunning.Operations: Google's own clients, how ends are mapped, filters, and WaitOperation."""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import closing
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.api_core import exceptions, operation, operation_async, operations_v1
from google.api_core.future import polling
from google.api_core.retry import AsyncRetry, Retry, if_exception_type
from google.longrunning import operations_pb2 as lro
from google.longrunning.operations_pb2_grpc import OperationsStub
from google.protobuf import duration_pb2, struct_pb2
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Role
from jobstatus_grpc.job import JobFilter, JobState
from jobstatus_grpc.server.operations import read_filter
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.auth import TRANSPORTS, Callers
from tests.support.loop import run
from tests.support.servers import serving_at

QUICK = Retry(if_exception_type(polling._OperationNotComplete), initial=0.01, maximum=0.05, timeout=20)
QUICK_ASYNC = AsyncRetry(if_exception_type(polling._OperationNotComplete), initial=0.01, maximum=0.05, timeout=20)


def name_of(job):
    return f"jobs/{job.id}"


def get(service, job):
    return service.operations.GetOperation(lro.GetOperationRequest(name=name_of(job)), timeout=20)


def wait(service, name, seconds=None, *, timeout=20.0):
    """Start a call of WaitOperation with a timeout in the request, and one of the call."""
    request = lro.WaitOperationRequest(name=name)
    if seconds is not None:
        request.timeout.FromTimedelta(timedelta(seconds=seconds))
    return service.operations.WaitOperation.future(request, timeout=timeout)


def status_of(found):
    metadata = pb.JobStatus()
    assert found.metadata.Unpack(metadata)
    return metadata


@pytest.fixture
def future(any_service):
    """Return the future of a job as Google's own clients make it."""
    client = operations_v1.OperationsClient(any_service.channel)

    def of(job):
        given = client.get_operation(name_of(job))
        return operation.from_gapic(given, client, struct_pb2.Struct, metadata_type=pb.JobStatus, polling=QUICK)

    return of


def test_the_result_of_a_job_is_that_of_googles_future(any_service, future, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    waiting, called = future(job), threading.Event()
    waiting.add_done_callback(lambda _: called.set())
    assert not waiting.done()
    any_service.update(job.id, progress=40)
    assert not waiting.done()
    assert waiting.metadata.progress == 40
    any_service.update(job.id, state="JOB_STATE_SUCCEEDED", result={"rows": 7})
    assert waiting.result(timeout=20)["rows"] == 7
    assert called.wait(20)
    assert waiting.metadata == any_service.get(job.id)


def test_the_error_of_a_job_is_the_exception_of_googles_future(any_service, future, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    waiting = future(job)
    any_service.update(job.id, state="JOB_STATE_FAILED", error=pb.JobError(code=code_pb2.DATA_LOSS, message="torn"))
    error = waiting.exception(timeout=20)
    assert (type(error), error.message) == (exceptions.DataLoss, "torn")
    with pytest.raises(exceptions.DataLoss):
        waiting.result(timeout=20)


def test_googles_future_cancels_a_job(any_service, future, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    waiting = future(job)
    assert waiting.cancel()
    assert any_service.get(job.id).cancel_requested
    assert not waiting.cancelled()
    any_service.update(job.id, state="JOB_STATE_CANCELLED")
    assert waiting.cancelled()
    assert not waiting.cancel()


def test_googles_asyncio_client_does_the_same(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())

    async def scenario():
        async with grpc.aio.insecure_channel(any_service.address) as channel:
            client = operations_v1.OperationsAsyncClient(channel)
            given = await client.get_operation(name_of(job))
            waiting = operation_async.from_gapic(
                given, client, struct_pb2.Struct, metadata_type=pb.JobStatus, retry=QUICK_ASYNC
            )
            assert not await waiting.done()
            assert await waiting.cancel()
            any_service.update(job.id, state="JOB_STATE_SUCCEEDED", result={"rows": 7})
            assert (await waiting.result(timeout=20))["rows"] == 7
            await client.delete_operation(name_of(job))
            with pytest.raises(exceptions.NotFound):
                await client.get_operation(name_of(job))

    run(scenario)


def test_googles_client_lists_pages_cancels_and_deletes(any_service, make, group):
    jobs = [make("SUCCEEDED") for _ in range(4)] + [make()]
    client = operations_v1.OperationsClient(any_service.channel)
    listed = client.list_operations("jobs", f'metadata.labels.group = "{group["group"]}"')
    assert [each.name for each in listed] == [name_of(job) for job in reversed(jobs)]
    client.cancel_operation(name_of(jobs[4]))
    assert any_service.get(jobs[4].id).cancel_requested
    with pytest.raises(exceptions.FailedPrecondition, match="cancel it, or wait for its end"):
        client.delete_operation(name_of(jobs[4]))
    client.delete_operation(name_of(jobs[0]))
    with pytest.raises(exceptions.NotFound):
        client.get_operation(name_of(jobs[0]))


def test_pages_hold_what_fits_and_their_tokens_are_for_one_filter(any_service, refused, make, group):
    jobs = [make() for _ in range(5)]
    request = lro.ListOperationsRequest(filter=f"metadata.labels.group = {group['group']}", page_size=2)
    names: list[str] = []
    while request.page_token or not names:
        page = any_service.operations.ListOperations(request, timeout=20)
        names += [each.name for each in page.operations]
        request.page_token = page.next_page_token
        if len(names) == 2:
            request.filter += " AND done = false"
            refusal = refused(any_service.operations.ListOperations, request, timeout=20)
            assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_TOKEN")
            request.filter = request.filter.removesuffix(" AND done = false")
    assert names == [name_of(job) for job in reversed(jobs)]


ERROR = pb.JobError(code=code_pb2.DATA_LOSS, message="torn", reason="TORN")
ENDS = [
    ("FAILED", {"error": ERROR, "reason": "why"}, "DATA_LOSS", "torn"),
    ("FAILED", {"error": pb.JobError(code=code_pb2.DATA_LOSS), "reason": "why"}, "DATA_LOSS", "why"),
    ("FAILED", {"reason": "why"}, "UNKNOWN", "why"),
    ("FAILED", {}, "UNKNOWN", "the job was failed"),
    ("ABORTED", {"error": ERROR}, "ABORTED", "torn"),
    ("ABORTED", {}, "ABORTED", "the job was aborted"),
    ("CANCELLED", {"error": ERROR}, "CANCELLED", "torn"),
    ("CANCELLED", {"reason": "why"}, "CANCELLED", "why"),
]


@pytest.mark.parametrize(("state", "fields", "code", "message"), ENDS)
def test_a_job_that_did_not_succeed_is_an_error(service, new_id, state, fields, code, message):
    job = service.job_in("IN_PROGRESS", id=new_id())
    done = service.update(job.id, state=f"JOB_STATE_{state}", **fields)
    found = get(service, job)
    assert (found.name, found.done, found.WhichOneof("result")) == (name_of(job), True, "error")
    assert (code_pb2.Code.Name(found.error.code), found.error.message) == (code, message)
    assert status_of(found) == done


@pytest.mark.parametrize("result", [None, {}, {"rows": 7.0, "files": ["a", None]}])
def test_a_job_that_succeeded_is_a_response_always(service, new_id, result):
    job = service.job_in("IN_PROGRESS", id=new_id())
    service.update(job.id, state="JOB_STATE_SUCCEEDED", **({} if result is None else {"result": result}))
    found, response = get(service, job), struct_pb2.Struct()
    assert (found.done, found.WhichOneof("result")) == (True, "response")
    assert found.response.Unpack(response)
    assert response == struct_pb2.Struct(fields={k: _value(v) for k, v in (result or {}).items()})


def _value(value: Any) -> struct_pb2.Value:
    struct = struct_pb2.Struct()
    struct.update({"": value})
    return struct.fields[""]


@pytest.mark.parametrize("state", ["PENDING", "IN_PROGRESS", "RETRYING"])
def test_an_open_job_has_no_result(service, new_id, state):
    job = service.job_in(state, id=new_id())
    found = get(service, job)
    assert (found.done, found.WhichOneof("result")) == (False, None)
    assert status_of(found) == job


METHODS = {
    "GetOperation": lro.GetOperationRequest,
    "WaitOperation": lro.WaitOperationRequest,
    "CancelOperation": lro.CancelOperationRequest,
    "DeleteOperation": lro.DeleteOperationRequest,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["", "jobs", "jobs/", "a", "operations/a", "jobs/a/b", "jobs/é", "/jobs/a", "Jobs/a"])
def test_what_is_no_name_of_an_operation_is_refused(service, refused, method, name):
    refusal = refused(getattr(service.operations, method), METHODS[method](name=name), timeout=20)
    assert (refusal.kind, refusal.fields) == (("INVALID_ARGUMENT", "INVALID_FIELD"), ["name"])


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_operation_is_not_found(service, refused, new_id, method):
    refusal = refused(getattr(service.operations, method), METHODS[method](name=f"jobs/{new_id()}"), timeout=20)
    assert (refusal.kind, refusal.domain) == (("NOT_FOUND", "JOB_NOT_FOUND"), "jobstatus.v1")


FILTERS = {
    "": JobFilter(),
    "  ": JobFilter(),
    "done=true": JobFilter(done=True),
    " done = false ": JobFilter(done=False),
    'metadata.state = "FAILED"': JobFilter(states={JobState.FAILED}),
    "metadata.state=JOB_STATE_IN_PROGRESS": JobFilter(states={JobState.IN_PROGRESS}),
    "metadata.stalled = true": JobFilter(stalled=True),
    'metadata.name = "nightly \\"backup\\" AND more"': JobFilter(names={'nightly "backup" AND more'}),
    "metadata.parent_id = p AND done = true": JobFilter(parent_id="p", done=True),
    'metadata.labels.team="core" AND metadata.labels.a.b = c': JobFilter(labels={"team": "core", "a.b": "c"}),
    r'metadata.labels."a \"b\", c!" = "x\*" AND metadata.name = a:b': JobFilter(
        labels={'a "b", c!': "x*"}, names={"a:b"}
    ),
    "done = true  AND  metadata.name=AND": JobFilter(done=True, names={"AND"}),
}


@pytest.mark.parametrize("text", FILTERS)
def test_a_filter_is_that_of_list_jobs(text):
    violations: Any = []
    assert (read_filter(text, violations), violations) == (FILTERS[text], [])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("done", "not understood: 'done'"),
        ("done = true AND", "not understood: 'done = true AND'"),
        ("done = true OR done = false", "not understood"),
        ("NOT done = true", "not understood"),
        ("(done = true)", "not understood"),
        ("done != true", "not understood"),
        *((f"metadata.labels.team {each} 3", "not understood") for each in ("!=", "<=", ">=", "<", ">", "~=", ":")),
        *((f"metadata.labels.team{each}3", "not understood") for each in ("!=", "<=", ">=", "~=", ",=")),
        *((f"metadata.name = {each}", "not understood") for each in ("<5", "'n'", "n*", '"n*"', "a,b", "~a")),
        ('metadata.name : "x"', "not understood"),
        ('metadata.name = "x', "not understood"),
        ('metadata.labels.a"b c" = 5', "not understood"),
        ("metadata.progress = 5", "there is no field 'metadata.progress'"),
        ("metadata.labels. = x", "there is no field"),
        ("done = maybe", "done: must be true or false"),
        ("metadata.state = LOST", "metadata.state: must be one of PENDING"),
        ("metadata.parent_id = é", "characters"),
        ('metadata.parent_id = ""', "metadata.parent_id: must not be empty"),
        ("done = true AND " * 400, "at most 4096 characters"),
    ],
)
def test_a_filter_that_is_not_supported_is_refused_with_what_is(service, refused, text, what):
    refusal = refused(service.operations.ListOperations, lro.ListOperationsRequest(filter=text), timeout=20)
    assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_FIELD")
    violations: Any = []
    read_filter(text, violations)
    assert what in " ".join(each.description for each in violations)


def test_two_values_of_one_field_match_nothing(service):
    request = lro.ListOperationsRequest(filter="done = true AND done = false")
    assert not service.operations.ListOperations(request, timeout=20).operations


@pytest.mark.parametrize("fields", [{"name": "operations"}, {"name": "jobs/a"}, {"page_size": -1}])
def test_a_list_of_what_is_not_there_is_refused(service, refused, fields):
    refusal = refused(service.operations.ListOperations, lro.ListOperationsRequest(**fields), timeout=20)
    assert (refusal.kind, refusal.fields) == (("INVALID_ARGUMENT", "INVALID_FIELD"), list(fields))


# WaitOperation


@pytest.fixture(scope="module", params=TRANSPORTS)
def waiting_service(request, serve_module, tmp_path_factory):
    store = f"sqlite:///{tmp_path_factory.mktemp('store')}/jobs.db"
    return serve_module("--transport", request.param, store=store)


def test_a_wait_ends_with_the_end_of_the_job(waiting_service, new_id):
    job = waiting_service.job_in("IN_PROGRESS", id=new_id())
    waits = [wait(waiting_service, name_of(job)) for _ in range(20)]
    for percent in range(5):
        waiting_service.update(job.id, progress=percent)
        assert not any(each.done() for each in waits)
    done = waiting_service.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert all(status_of(each.result()) == done for each in waits)


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "ABORTED", "CANCELLED"])
def test_a_wait_for_a_done_job_returns_at_once(waiting_service, new_id, state):
    job = waiting_service.job_in(state, id=new_id())
    assert wait(waiting_service, name_of(job)).result() == get(waiting_service, job)


@pytest.mark.parametrize("seconds", [0, 0.000001, 0.3])
def test_a_wait_returns_the_latest_state_after_its_timeout(waiting_service, new_id, seconds):
    job = waiting_service.job_in("IN_PROGRESS", id=new_id())
    began_at = time.monotonic()
    waiting = wait(waiting_service, name_of(job), seconds)
    if seconds > 0.1:
        job = waiting_service.update(job.id, progress=7)
    assert status_of(waiting.result()) == job
    assert time.monotonic() - began_at >= seconds


def test_a_wait_returns_the_latest_state_before_the_deadline_of_the_call(waiting_service, new_id):
    job = waiting_service.job_in("IN_PROGRESS", id=new_id())
    began_at = time.monotonic()
    assert not wait(waiting_service, name_of(job), 60, timeout=2).result().done
    assert 1 < time.monotonic() - began_at < 2


@pytest.mark.parametrize("fields", [{"seconds": -1}, {"seconds": 1, "nanos": -1}])
def test_a_wait_of_a_bad_duration_is_refused(waiting_service, refused, new_id, fields):
    job = waiting_service.job_in("IN_PROGRESS", id=new_id())
    request = lro.WaitOperationRequest(name=name_of(job), timeout=duration_pb2.Duration(**fields))
    assert refused(waiting_service.operations.WaitOperation, request, timeout=20).fields == ["timeout"]


def test_a_wait_for_a_job_that_is_deleted_after_its_end_still_returns_the_end(waiting_service, new_id):
    job = waiting_service.create(id=new_id())
    waits = [wait(waiting_service, name_of(job)) for _ in range(20)]
    waiting_service.cancel(job.id)
    waiting_service.stub.DeleteJob(pb.DeleteJobRequest(id=job.id), timeout=20)
    ends = [each.exception() or each.result() for each in waits]
    assert {end.done for end in ends if isinstance(end, lro.Operation)} <= {True}
    assert {end.code().name for end in ends if not isinstance(end, lro.Operation)} <= {"NOT_FOUND"}


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_wait_counts_as_a_watch_until_its_client_leaves(serve, refused, transport):
    service = serve("--transport", transport, "--max-watchers", "2")
    job = service.job_in("IN_PROGRESS")
    streams = [service.watch(job.id) for _ in range(2)]
    for stream in streams:
        next(stream)
    refusal = refused(wait(service, name_of(job)).result)
    assert refusal.kind == ("RESOURCE_EXHAUSTED", "TOO_MANY_WATCHERS")
    streams[0].cancel()
    waiting = until(lambda: wait(service, name_of(job), timeout=1), lambda each: each.exception() is None)
    assert not waiting.result().done
    for _ in range(20):
        left = wait(service, name_of(job))
        left.cancel()
    assert until(lambda: wait(service, name_of(job), 0), lambda each: each.exception() is None)


def until(make, is_good):
    """Make a call again and again until it ends as it should."""
    ends_at = time.monotonic() + 20
    while not is_good(made := make()):
        assert time.monotonic() < ends_at
    return made


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_signal_ends_waits_with_a_retry_delay(serve, refused, transport):
    service = serve("--transport", transport, "--drain-grace", "15s")
    job = service.job_in("IN_PROGRESS")
    waits = [wait(service, name_of(job)) for _ in range(20)]
    service.watch(job.id).next()
    began_at = time.monotonic()
    service.process.signal(signal.SIGTERM)
    refusals = [refused(each.result) for each in waits]
    assert {refusal.kind for refusal in refusals} == {("UNAVAILABLE", "DRAINING")}
    assert all(refusal.retry_seconds > 0 for refusal in refusals)
    assert service.process.wait() == 0
    assert time.monotonic() - began_at < 15


def test_a_wait_that_has_reached_the_age_of_a_watch_returns_the_latest_state(serve):
    service = serve("--max-connection-age", "1s")
    job = service.job_in("IN_PROGRESS")
    assert status_of(wait(service, name_of(job)).result()) == job


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_wait_ends_when_its_caller_is_revoked(serve, auth, refused, transport):
    auth.admit("root")
    auth.admit("visitor", Role.WATCHER)
    with closing(Callers(serve("--auth", str(auth.path), "--transport", transport), auth)) as callers:
        job = callers["root"].job_in("IN_PROGRESS")
        waiting = wait(callers["visitor"], name_of(job))
        next(callers["visitor"].watch(job.id))  # calls of one connection begin in order
        auth.remove("visitor")
        assert refused(waiting.result).kind == ("UNAUTHENTICATED", "BAD_IDENTITY")


def test_a_wait_of_a_caller_that_may_not_see_the_job_any_more_ends(serve, auth, refused):
    auth.admit("root")
    auth.admit("core", more='only = { labels = { team = "core" } }')
    with closing(Callers(serve("--auth", str(auth.path)), auth)) as callers:
        job = callers["root"].job_in("IN_PROGRESS", labels={"team": "core"})
        waiting = wait(callers["core"], name_of(job))
        next(callers["core"].watch(job.id))
        callers["root"].update(job.id, labels={"team": "web"})
        assert refused(waiting.result).kind == ("NOT_FOUND", "JOB_NOT_FOUND")


def test_a_list_has_the_jobs_of_the_caller_only(serve, auth):
    auth.admit("root")
    auth.admit("other", tenant="other")
    auth.admit("core", more='only = { labels = { team = "core" } }')
    with closing(Callers(serve("--auth", str(auth.path)), auth)) as callers:
        for team in ("core", "web"):
            callers["root"].create(id=team, labels={"team": team})
        callers["other"].create(id="other")
        listed = {
            name: {
                each.name for each in callers[name].operations.ListOperations(lro.ListOperationsRequest()).operations
            }
            for name in ("root", "other", "core")
        }
    assert listed == {"root": {"jobs/core", "jobs/web"}, "other": {"jobs/other"}, "core": {"jobs/core"}}


# What surrounds each call


def test_the_log_of_calls_names_the_job(serve, tmp_path):
    service = serve("--log-calls", "--log-format", "json", log=tmp_path / "log")
    job = service.job_in("SUCCEEDED")
    get(service, job)
    wait(service, name_of(job)).result()
    service.process.terminate()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    found = {line["method"]: line for line in lines if line.get("method", "").endswith("Operation")}
    assert {method: (line["code"], line["job"]) for method, line in found.items()} == dict.fromkeys(
        ("GetOperation", "WaitOperation"), ("OK", job.id)
    )


def test_health_has_the_service(service):
    stub: Any = health_pb2_grpc.HealthStub(service.channel)
    request = health_pb2.HealthCheckRequest(service="google.longrunning.Operations")
    assert stub.Check(request, timeout=20).status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_describes_the_service(service):
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(service.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services="*"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="google.longrunning.Operations.WaitOperation"),
    ]
    listed, described = stub.ServerReflectionInfo(iter(requests), timeout=20)
    assert "google.longrunning.Operations" in [each.name for each in listed.list_services_response.service]
    assert described.file_descriptor_response.file_descriptor_proto


class CountingStore(MemoryStore):
    """Counts the reads of single jobs."""

    reads = 0

    async def get(self, tenant, job_id, *, only=None):
        self.reads += 1
        return await super().get(tenant, job_id, only=only)


def test_a_wait_reads_the_job_once():
    async def scenario():
        store = CountingStore()
        async with serving_at(store) as (stub, address), grpc.aio.insecure_channel(address) as channel:
            await stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id="a")))
            waiting = OperationsStub(channel).WaitOperation(lro.WaitOperationRequest(name="jobs/a"), timeout=20)
            await stub.WatchJob(pb.WatchJobRequest(id="a")).read()
            await stub.CancelJob(pb.CancelJobRequest(id="a"))
            assert (await waiting).error.code == code_pb2.CANCELLED
            return store.reads

    assert run(scenario) == 2
