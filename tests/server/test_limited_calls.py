"""Calls on a server with [limits]: what is refused, what clients do then, and what others notice of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import re
import time

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Role
from jobstatus_grpc.server.held_refusals import HOLD_SECONDS
from jobstatus_grpc.server.logs import RequestLog
from jobstatus_grpc.server.middleware import MAX_REFUSED_BYTES
from jobstatus_grpc.stores.memory import MemoryStore
from tests.server.test_authentication import metrics_when
from tests.support.auth import TRANSPORTS, AuthText, bearer, until_answered
from tests.support.loop import run as run_on_a_loop
from tests.support.servers import serving_at
from tests.support.service import Service, read_refusal, update_of

SOON_SECONDS = 5.0


@pytest.fixture
def auth(tmp_path):
    """Admits the callers ci and other of one tenant; `add` the limits."""
    auth = AuthText(tmp_path / "auth.toml")
    for name in ("ci", "other"):
        auth.admit(name, Role.OPERATOR)
    return auth


class Caller:
    """Calls with the token of one caller."""

    def __init__(self, stub, token):
        self._stub = stub
        self._token = token
        self._options = {"metadata": bearer(token), "timeout": 20}

    def in_tenant(self, tenant):
        """Return the same caller, which selects a tenant with each call."""
        caller = Caller(self._stub, self._token)
        caller._options["metadata"] = (*bearer(self._token), ("x-jobstatus-tenant", tenant))
        return caller

    def with_timeout(self, seconds):
        caller = Caller(self._stub, self._token)
        caller._options = {**self._options, "timeout": seconds}
        return caller

    def create(self, **fields):
        return self._stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(**fields)), **self._options)

    def get(self, job_id):
        return self._stub.GetJob(pb.GetJobRequest(id=job_id), **self._options)

    def delete(self, job_id):
        return self._stub.DeleteJob(pb.DeleteJobRequest(id=job_id), **self._options)

    def batch(self, *job_ids):
        updates = [update_of(job_id, reason="x") for job_id in job_ids]
        return self._stub.BatchUpdateJobs(pb.BatchUpdateJobsRequest(updates=updates), **self._options)

    def watch(self, job_id):
        return self._stub.WatchJob(pb.WatchJobRequest(id=job_id), metadata=self._options["metadata"])


@pytest.fixture(params=TRANSPORTS)
def run(request, auth):
    """Run a scenario with the two callers of a server with these limits, and its address."""

    def run(limits, scenario, store=None, **settings):
        auth.add("limits", limits)

        async def main():
            store_ = store or MemoryStore()
            async with serving_at(store_, auth=str(auth.path), transport=request.param, **settings) as (stub, address):
                return await scenario(*(Caller(stub, auth.tokens[name]) for name in ("ci", "other")), address)

        return run_on_a_loop(main)

    return run


async def refusal_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


async def refused_at_last(make_call):
    """Call until a call is refused; return how, and the number of calls before."""
    for number in range(1000):
        try:
            await make_call()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                return read_refusal(error), number
    raise AssertionError("no call is refused")


async def first_message(stream):
    return await stream.read()


def test_a_call_beyond_the_limit_is_refused_until_there_is_room_and_other_callers_are_not(run):
    async def scenario(ci, other, _):
        refusal, number = await refused_at_last(lambda: ci.get("a"))
        assert (refusal.kind, number >= 3) == (("RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS"), True)
        assert refusal.metadata == {"limit": "calls_per_second", "scope": "principal", "value": "2"}
        assert 0 < refusal.retry_seconds <= 0.5
        assert (await refusal_of(other.get("a"))).reason == "JOB_NOT_FOUND"
        await asyncio.sleep(refusal.retry_seconds)
        assert (await refusal_of(ci.get("a"))).reason == "JOB_NOT_FOUND"

    run("[limits.principals.ci]\ncalls_per_second = 2\ncalls_burst = 3", scenario)


def test_a_caller_with_a_short_deadline_gets_its_refusal_before_that(run):
    async def scenario(ci, other, _):
        await refused_at_last(lambda: ci.get("a"))
        hasty = ci.with_timeout(0.4)
        for refusal in await asyncio.gather(*(refusal_of(hasty.get("a")) for _ in range(5))):
            assert refusal.kind == ("RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS")

    run("[limits.principals.ci]\ncalls_per_second = 1\ncalls_burst = 1", scenario)


def test_a_batch_counts_its_updates_and_may_be_larger_than_the_burst(run):
    async def scenario(ci, other, _):
        await ci.create(id="a")
        assert len((await ci.batch(*["a"] * 300)).results) == 300
        refusal = await refusal_of(ci.batch("a"))
        assert refusal.metadata == {"limit": "updates_per_second", "scope": "principal", "value": "10"}
        assert 25 < refusal.retry_seconds < 31
        assert (await ci.get("a")).job.id == "a"
        assert len((await other.batch("a")).results) == 1

    run("[limits]\nupdates_per_second = 10", scenario)


def test_a_principal_has_a_limit_of_open_watches(run):
    async def scenario(ci, other, _):
        await ci.create(id="a")
        streams = [ci.watch("a") for _ in range(2)]
        for stream in streams:
            await first_message(stream)
        refusal = await refusal_of(first_message(ci.watch("a")))
        assert (refusal.reason, refusal.metadata["limit"]) == ("TOO_MANY_WATCHERS", "watches")
        await first_message(other.watch("a"))
        streams[0].cancel()
        await until_answered(lambda: first_message(ci.watch("a")), seconds=SOON_SECONDS)

    run("[limits]\nwatches = 2", scenario)


def test_an_admin_has_the_limits_of_one_principal_over_all_tenants_and_those_of_each_tenant(run, auth):
    async def scenario(ci, other, _):
        for number in range(3):
            tenant = ci.in_tenant(f"t{number}")
            await tenant.create(id="a")
            watches.append(tenant.watch("a"))
            await first_message(watches[-1])
        assert (await refusal_of(first_message(ci.in_tenant("t3").watch("a")))).metadata["scope"] == "principal"
        refusal, number = await refused_at_last(lambda: ci.in_tenant(f"t{next(numbers)}").get("a"))
        assert refusal.metadata == {"limit": "calls_per_second", "scope": "principal", "value": "1"}
        assert number < 30
        await other.in_tenant("t1").batch(*["a"] * 300)
        await other.in_tenant("t2").get("a")
        assert (await refusal_of(other.in_tenant("t1").create(id="b"))).metadata["scope"] == "tenant"

    watches, numbers = [], itertools.count()
    for name in ("ci", "other"):
        auth.admit(name, Role.ADMIN)
    limits = "[limits.principals.ci]\ncalls_per_second = 1\ncalls_burst = 20\nwatches = 3"
    run(f"{limits}\n[limits.tenants.t1]\nupdates_per_second = 10", scenario)


def test_a_tenant_has_a_limit_of_jobs_and_a_deletion_makes_room(run):
    async def scenario(ci, other, _):
        for number in range(3):
            await (ci, other)[number % 2].create(id=f"a{number}", state=pb.JOB_STATE_PENDING)
        refusal = await refusal_of(ci.create(id="b"))
        assert (refusal.kind, refusal.retry_seconds) == (("RESOURCE_EXHAUSTED", "TOO_MANY_JOBS"), 5)
        assert refusal.metadata == {"limit": "jobs", "scope": "tenant", "value": "3"}
        assert (await refusal_of(ci.create(id="a1"))).reason == "JOB_ALREADY_EXISTS"
        await ci._stub.CancelJob(pb.CancelJobRequest(id="a0", force=True), **ci._options)
        await ci.delete("a0")
        assert (await until_answered(lambda: ci.create(id="b"), seconds=SOON_SECONDS)).job.id == "b"

    run("[limits.tenants.default]\njobs = 3", scenario)


def test_updates_and_batches_that_create_their_jobs_are_within_the_limit_of_jobs(run):
    async def scenario(ci, _, __):
        def creation(job_id):
            return update_of(job_id, state=pb.JOB_STATE_IN_PROGRESS, allow_missing=True)

        for _ in range(2):
            await ci._stub.UpdateJob(creation("a"), **ci._options)
        batch = pb.BatchUpdateJobsRequest(updates=[creation(job_id) for job_id in "abc"])
        results = (await ci._stub.BatchUpdateJobs(batch, **ci._options)).results
        assert [result.HasField("job") for result in results] == [True, True, False]
        assert (await refusal_of(ci._stub.UpdateJob(creation("c"), **ci._options))).reason == "TOO_MANY_JOBS"

    run("[limits.each_tenant]\njobs = 2", scenario)


def test_creations_that_are_refused_take_no_room(run):
    async def scenario(ci, _, __):
        await ci.create(id="a")
        for _ in range(3):
            assert (await refusal_of(ci.create(id="a"))).reason == "JOB_ALREADY_EXISTS"
        await ci.create(id="b")

    run("[limits.each_tenant]\njobs = 2", scenario)


def test_jobs_that_were_there_before_the_start_count(run):
    async def fill(ci, _, __):
        await ci.create(id="a")

    async def create_another(ci, _, __):
        return (await refusal_of(ci.create(id="b"))).reason

    store = MemoryStore()
    run("", fill, store=store)
    assert run("[limits.each_tenant]\njobs = 1", create_another, store=store) == "TOO_MANY_JOBS"


def test_limits_change_with_the_file_and_what_is_used_stays_counted(run, auth):
    async def scenario(ci, _, __):
        await refused_at_last(lambda: ci.get("a"))
        auth.add("limits", "[limits]\ncalls_per_second = 40\ncalls_burst = 900")
        ends_at = time.monotonic() + SOON_SECONDS
        while time.monotonic() < ends_at:
            refusal, number = await refused_at_last(lambda: ci.get("a"))
            if refusal.metadata["value"] == "40":
                return number
            await asyncio.sleep(0.1)
        raise AssertionError("the new limit is not used")

    assert run("[limits]\ncalls_per_second = 20", scenario) < 200


def test_a_caller_that_calls_again_at_once_gets_few_refusals_and_a_drain_does_not_wait_for_them(run):
    async def scenario(ci, other, _):
        refusals = 0

        async def call_again_and_again():
            nonlocal refusals
            while True:
                try:
                    await ci.get("a")
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.UNAVAILABLE:
                        return
                    refusals += error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        callers.extend(asyncio.ensure_future(call_again_and_again()) for _ in range(100))
        await refused_at_last(lambda: ci.get("a"))
        refusals, began_at = 0, time.monotonic()
        while time.monotonic() - began_at < 1.5:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await other.get("a")
        assert refusals / (time.monotonic() - began_at) < 300

    callers = []
    run("[limits.principals.ci]\ncalls_per_second = 10", scenario)


def test_large_calls_that_are_refused_are_held_as_others(run):
    async def scenario(ci, _, __):
        await ci.batch(*["a"] * 300)
        began_at = time.monotonic()
        assert (await refusal_of(ci.create(reason="x" * 1_000_000))).reason == "TOO_MANY_REQUESTS"
        assert time.monotonic() - began_at >= HOLD_SECONDS

    run("[limits]\nupdates_per_second = 1", scenario)


def test_the_log_has_the_job_of_a_refused_call_unless_that_is_large(run):
    async def scenario(ci, _, __):
        await ci.batch(*["a"] * 300)
        await refusal_of(ci.create(id="small"))
        await refusal_of(ci.create(id="large", reason="x" * MAX_REFUSED_BYTES))

    lines = io.StringIO()
    request_log = RequestLog(log_format="json", stream=lines)
    run("[limits]\nupdates_per_second = 1", scenario, request_log=request_log)
    request_log.flush()
    calls = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [call.get("job") for call in calls if call["method"] == "CreateJob"] == ["small", None]


class HeldStore(MemoryStore):
    """Commits once `go_on` is set."""

    def __init__(self):
        super().__init__()
        self.go_on = asyncio.Event()

    async def commit(self, commands):
        await self.go_on.wait()
        return await super().commit(commands)


def test_one_caller_cannot_take_all_places_of_calls_in_flight(run):
    async def scenario(ci, other, _):
        waiting = [asyncio.ensure_future(until_answered(ci.create, seconds=SOON_SECONDS)) for _ in range(8)]
        refusal, _ = await refused_at_last(lambda: ci.get("a"))
        assert refusal.kind == ("RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS")
        assert (await refusal_of(other.get("a"))).reason == "JOB_NOT_FOUND"
        store.go_on.set()
        assert len(await asyncio.gather(*waiting)) == 8

    store = HeldStore()
    run("", scenario, store=store, max_requests=9)


def test_one_caller_cannot_take_all_places_of_watches(run):
    async def scenario(ci, other, _):
        await ci.create(id="a")
        watches = [ci.watch("a") for _ in range(8)]
        assert all([await watch.read() for watch in watches])
        refusal = await refusal_of(first_message(ci.watch("a")))
        assert (refusal.kind, refusal.retry_seconds > 0) == (("RESOURCE_EXHAUSTED", "TOO_MANY_WATCHERS"), True)
        assert await other.watch("a").read()

    run("", scenario, max_watchers=9)


def test_an_admin_cannot_take_all_places_by_selecting_many_tenants(run, auth):
    async def scenario(ci, other, _):
        tenants = [ci.in_tenant(f"t{number}") for number in range(8)]
        waiting = [asyncio.ensure_future(until_answered(tenant.create, seconds=SOON_SECONDS)) for tenant in tenants]
        refusal, _ = await refused_at_last(lambda: ci.in_tenant("t9").get("a"))
        assert refusal.kind == ("RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS")
        assert (await refusal_of(other.get("a"))).reason == "JOB_NOT_FOUND"
        store.go_on.set()
        assert len(await asyncio.gather(*waiting)) == 8

    store = HeldStore()
    auth.admit("ci", Role.ADMIN)
    run("", scenario, store=store, max_requests=9)


def test_metrics_count_refusals_by_limit_and_scope(auth, serve, tmp_path):
    auth.add("limits", "[limits.principals.ci]\nupdates_per_second = 1\n[limits.each_tenant]\njobs = 1")
    log = tmp_path / "log"
    service = serve("--auth", str(auth.path), "--metrics", "127.0.0.1:0", log=log)
    ci, other = (Service(service.address, metadata=bearer(auth.tokens[name])) for name in ("ci", "other"))
    for call in (other.create, lambda: ci.batch(*[update_of("a")] * 400)):
        for _ in range(2):
            with contextlib.suppress(grpc.RpcError):
                call()
    for caller in (ci, other):
        caller.close()
    (url,) = re.findall(r"http://[^\s\"]+/metrics", log.read_text())
    lines = metrics_when(url, 'jobstatus_limit_refusals_total{limit="updates_per_second",scope="principal"} 1.0')
    assert 'jobstatus_limit_refusals_total{limit="jobs",scope="tenant"} 1.0' in lines
    assert 'jobstatus_limit_refusals_total{limit="watches",scope="tenant"} 0.0' in lines
