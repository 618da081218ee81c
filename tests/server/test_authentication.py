"""Calls on a server with --auth: identities, refusals, and changes of the file."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from datetime import datetime, timedelta, timezone

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import AsyncJobStatusClient, BadIdentityError, JobStatusClient
from jobstatus_grpc.auth import Role
from jobstatus_grpc.server import auth_file, open_watches
from jobstatus_grpc.server.access import LEAST_ROLES
from jobstatus_grpc.server.logs import RequestLog
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.auth import TRANSPORTS, AuthText, Callers, bearer, until_answered
from tests.support.servers import serving
from tests.support.service import read_refusal

LONGEST_SECONDS = 10.0


@pytest.fixture(params=TRANSPORTS)
def run(request, auth, monkeypatch):
    """Run a scenario on the stub of a server with the test's auth file, at which it looks often."""
    monkeypatch.setattr(auth_file, "CHECK_SECONDS", 0.03)
    monkeypatch.setattr(open_watches, "CHECK_SECONDS", 0.1)

    def run(scenario, **settings):
        async def main():
            async with serving(MemoryStore(), auth=str(auth.path), transport=request.param, **settings) as stub:
                return await scenario(stub)

        return asyncio.run(asyncio.wait_for(main(), 30))

    return run


def create(stub, token, **fields):
    return stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(**fields)), metadata=bearer(token))


async def refusal_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


async def until_refused(make_call):
    """Repeat a call until it is refused; return how, which must come soon."""

    async def repeat():
        while True:
            try:
                await make_call()
            except grpc.aio.AioRpcError as error:
                return read_refusal(error)
            await asyncio.sleep(0.05)

    return await asyncio.wait_for(repeat(), LONGEST_SECONDS)


@contextlib.asynccontextmanager
async def watching(stub, token, job_id="a"):
    """Open a watch of a job, read its snapshot, and yield it."""
    watch = stub.WatchJob(pb.WatchJobRequest(id=job_id), metadata=bearer(token))
    await asyncio.wait_for(watch.read(), LONGEST_SECONDS)
    yield watch
    watch.cancel()


async def end_of(watch):
    """Return how a watch ends, which must come soon."""

    async def read():
        while await watch.read() is not grpc.aio.EOF:
            pass

    return (await refusal_of(asyncio.wait_for(read(), LONGEST_SECONDS))).kind


def test_the_principal_is_the_actor_and_in_the_log_and_the_token_is_not(auth, run):
    token, stream = auth.admit("ci"), io.StringIO()

    async def scenario(stub):
        await create(stub, token, id="a")
        return await stub.ListJobTransitions(pb.ListJobTransitionsRequest(id="a"), metadata=bearer(token))

    history = run(scenario, request_log=RequestLog(log_format="json", stream=stream))
    assert [entry.actor for entry in history.transitions] == ["ci"]
    assert {json.loads(line)["principal"] for line in stream.getvalue().splitlines()} == {"ci"}
    assert token not in stream.getvalue()


def test_bad_credentials_are_unauthenticated_with_a_reason(auth, run):
    token = auth.admit("ci")
    late = auth.admit("late", expires_at=datetime.now(timezone.utc) - timedelta(days=1))
    headers = [(), bearer("jst_x"), (("authorization", f"Basic {token}"),), bearer(token) * 2, bearer(late)]

    async def scenario(stub):
        request = pb.GetJobRequest(id="a")
        return [(await refusal_of(stub.GetJob(request, metadata=header))).kind for header in headers]

    reasons = ["NO_IDENTITY", "BAD_IDENTITY", "BAD_IDENTITY", "BAD_IDENTITY", "IDENTITY_EXPIRED"]
    assert run(scenario) == [("UNAUTHENTICATED", reason) for reason in reasons]


def test_the_role_decides_what_a_caller_may_do(auth, run):
    token = auth.admit("board", Role.WATCHER)

    async def scenario(stub):
        seen = await refusal_of(stub.GetJob(pb.GetJobRequest(id="a"), metadata=bearer(token)))
        return seen.kind, (await refusal_of(create(stub, token, id="a"))).kind

    assert run(scenario) == (("NOT_FOUND", "JOB_NOT_FOUND"), ("PERMISSION_DENIED", "NOT_ALLOWED"))


def test_a_token_that_is_removed_is_refused_soon_and_one_that_is_added_is_accepted(auth, run):
    auth.admit("ops")
    token = auth.admit("ci")

    async def scenario(stub):
        await create(stub, token)
        auth.remove("ci")
        refusal = await until_refused(lambda: create(stub, token))
        await until_answered(lambda: create(stub, auth.tokens["ops"]), seconds=LONGEST_SECONDS)
        added = auth.admit("new")
        await until_answered(lambda: create(stub, added), seconds=LONGEST_SECONDS)
        return refusal.kind

    assert run(scenario) == ("UNAUTHENTICATED", "BAD_IDENTITY")


@pytest.mark.slow
def test_a_token_is_refused_from_the_second_of_its_expiry(auth, run):
    token = auth.admit("ci", expires_at=datetime.now(timezone.utc) + timedelta(seconds=3))

    async def scenario(stub):
        await create(stub, token)
        return (await until_refused(lambda: create(stub, token))).kind

    assert run(scenario) == ("UNAUTHENTICATED", "IDENTITY_EXPIRED")


@pytest.mark.parametrize("bad", ["", "[[tokens]\n", '[[tokens]]\nname = "x"\n'])
def test_a_bad_file_changes_nothing_and_is_logged_and_counted_once(auth, run, caplog, bad):
    token = auth.admit("ci")

    async def scenario(stub):
        auth.path.write_text(bad)
        while not caplog.records:
            await create(stub, token)
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
        await create(stub, token)
        added = auth.admit("new")
        await until_answered(lambda: create(stub, added), seconds=LONGEST_SECONDS)

    with caplog.at_level("ERROR", "jobstatus_grpc.server"):
        run(scenario)
    (record,) = caplog.records
    assert str(auth.path) in record.getMessage()
    assert "The contents from before stay in use" in record.getMessage()


def test_a_file_that_is_touched_all_the_time_delays_no_revocation(auth, run):
    auth.admit("ops")
    token = auth.admit("ci")

    async def touch():
        while True:
            os.utime(auth.path)
            await asyncio.sleep(auth_file.CHECK_SECONDS / 10)

    async def scenario(stub):
        await create(stub, token)
        auth.remove("ci")
        touching = asyncio.ensure_future(touch())
        refusal = await until_refused(lambda: create(stub, token))
        touching.cancel()
        return refusal.kind

    assert run(scenario) == ("UNAUTHENTICATED", "BAD_IDENTITY")


def test_a_link_that_is_swapped_is_a_change(auth, run, tmp_path):
    token, now = auth.admit("ci"), tmp_path / "..data"
    other = AuthText(tmp_path / "v2.toml")
    added = other.admit("new")
    auth.path.rename(tmp_path / "v1.toml")
    now.symlink_to("v1.toml")
    auth.path.symlink_to("..data")

    async def scenario(stub):
        await create(stub, token)
        (tmp_path / "..tmp").symlink_to("v2.toml")
        (tmp_path / "..tmp").replace(now)
        await until_answered(lambda: create(stub, added), seconds=LONGEST_SECONDS)
        return (await refusal_of(create(stub, token))).kind

    assert run(scenario) == ("UNAUTHENTICATED", "BAD_IDENTITY")


def test_health_and_reflection_need_no_token(auth, serve):
    auth.admit("ci")
    service = serve("--auth", str(auth.path))
    check = service.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"", timeout=20) == b"\x08\x01"


def test_metrics_count_refusals_and_reloads(auth, serve, tmp_path):
    token, worker, log = auth.admit("ci"), auth.admit("worker", Role.WORKER), tmp_path / "log"
    service = serve("--auth", str(auth.path), "--metrics", "127.0.0.1:0", log=log)
    with pytest.raises(grpc.RpcError, match=r"send a token .--token-file, JOBSTATUS_TOKEN"):
        service.get("a")
    with pytest.raises(grpc.RpcError, match="only the role admin may choose a tenant"):
        service.stub.GetJob(pb.GetJobRequest(id="a"), metadata=[*bearer(token), ("x-jobstatus-tenant", "other")])
    with pytest.raises(grpc.RpcError, match="needs the role operator"):
        service.stub.DeleteJob(pb.DeleteJobRequest(id="a"), metadata=bearer(worker))
    auth.admit("new")
    (url,) = re.findall(r"http://[^\s\"]+/metrics", log.read_text())
    lines = metrics_when(url, 'jobstatus_auth_reloads_total{result="success"} 1.0')
    assert 'jobstatus_auth_refusals_total{reason="NO_IDENTITY"} 1.0' in lines
    assert 'jobstatus_auth_refusals_total{reason="BAD_IDENTITY"} 0.0' in lines
    assert 'jobstatus_auth_refusals_total{reason="NOT_ALLOWED"} 2.0' in lines
    assert 'jobstatus_auth_reloads_total{result="failure"} 0.0' in lines
    assert token not in log.read_text()


def metrics_when(url, line):
    """Return the lines of the metrics once `line` is among them."""
    ends_at = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < ends_at:
        with urllib.request.urlopen(url) as answer:
            lines = answer.read().decode().splitlines()
        if line in lines:
            return lines
        time.sleep(0.1)
    raise AssertionError(f"{line} did not come")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "admits no caller; add a stanza [[tokens]]: jobstatus token new prints one"),
        ("[[token]]\n", "line 1: token: there is no such setting; did you mean tokens?"),
    ],
)
def test_a_bad_file_at_the_start_is_one_line_and_exit_2(tmp_path, text, says):
    path = tmp_path / "auth.toml"
    if text is not None:
        path.write_text(text)
    command = [sys.executable, "-m", "jobstatus_grpc", "serve", "--store", "memory:", "--listen", "127.0.0.1:0"]
    done = subprocess.run([*command, "--auth", str(path)], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{path}" in done.stderr
    assert says in done.stderr


def test_a_watch_ends_when_its_caller_is_removed_and_others_go_on(auth, run):
    ops, token = auth.admit("ops"), auth.admit("ci")

    async def scenario(stub):
        await create(stub, ops, id="a")
        async with watching(stub, ops) as other, watching(stub, token) as watch:
            auth.remove("ci")
            end = await end_of(watch)
            await stub.CancelJob(pb.CancelJobRequest(id="a"), metadata=bearer(ops))
            return end, (await other.read()).event.job.done

    assert run(scenario) == (("UNAUTHENTICATED", "BAD_IDENTITY"), True)


@pytest.mark.slow
def test_a_watch_ends_when_its_caller_expires(auth, run):
    token = auth.admit("ci", expires_at=datetime.now(timezone.utc) + timedelta(seconds=3))

    async def scenario(stub):
        await create(stub, token, id="a")
        async with watching(stub, token) as watch:
            return await end_of(watch)

    assert run(scenario) == ("UNAUTHENTICATED", "IDENTITY_EXPIRED")


@pytest.mark.slow
def test_a_watch_goes_on_when_its_caller_is_renewed(auth, run):
    soon = datetime.now(timezone.utc) + timedelta(seconds=3)
    token = auth.admit("ci", expires_at=soon)

    async def scenario(stub):
        await create(stub, token, id="a")
        async with watching(stub, token) as watch:
            auth.admit("ci", expires_at=soon + timedelta(days=1))
            await asyncio.sleep((soon - datetime.now(timezone.utc)).total_seconds() + 0.5)
            await stub.CancelJob(pb.CancelJobRequest(id="a"), metadata=bearer(token))
            return (await watch.read()).event.job.done

    assert run(scenario) is True


def test_a_watch_ends_when_its_callers_role_no_longer_allows_it(auth, run, monkeypatch):
    monkeypatch.setitem(LEAST_ROLES, "WatchJob", Role.WORKER)
    ops, token = auth.admit("ops"), auth.admit("ci", Role.WORKER)

    async def scenario(stub):
        await create(stub, ops, id="a")
        async with watching(stub, ops) as other, watching(stub, token) as watch:
            auth.admit("ci", Role.WATCHER)
            end = await end_of(watch)
            await stub.CancelJob(pb.CancelJobRequest(id="a"), metadata=bearer(ops))
            return end, (await other.read()).event.job.done

    assert run(scenario) == (("PERMISSION_DENIED", "NOT_ALLOWED"), True)


async def until_in_tenant(stub, token, tenant):
    request = pb.GetCallerIdentityRequest()
    while (await stub.GetCallerIdentity(request, metadata=bearer(token))).identity.tenant != tenant:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


def test_an_admins_watch_of_a_tenant_ends_when_it_is_no_admin_any_more(auth, run):
    token = auth.admit("boss", Role.ADMIN)
    metadata = (*bearer(token), ("x-jobstatus-tenant", "acme"))

    async def scenario(stub):
        watch = stub.WatchJobs(pb.WatchJobsRequest(), metadata=metadata)
        await watch.read()
        auth.admit("boss", Role.ADMIN, tenant="other")
        await until_in_tenant(stub, token, "other")
        await stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id="a")), metadata=metadata)
        event = await watch.read()
        auth.admit("boss", Role.OPERATOR)
        return event.events[0].job.id, await end_of(watch)

    assert run(scenario) == ("a", ("PERMISSION_DENIED", "NOT_ALLOWED"))


@pytest.mark.parametrize("change", [{"tenant": "other"}, {"more": 'only = { name_prefix = "x" }'}])
def test_a_watch_is_to_be_called_again_when_its_caller_sees_other_jobs(auth, run, change):
    token = auth.admit("ci")

    async def scenario(stub):
        await create(stub, token, id="a")
        async with watching(stub, token) as watch:
            auth.admit("ci", **change)
            return await end_of(watch)

    assert run(scenario) == ("UNAVAILABLE", "IDENTITY_CHANGED")


@pytest.mark.parametrize("method", ["WatchJob", "WatchJobs"])
def test_the_end_of_a_watch_frees_its_place_and_is_counted(auth, run, method):
    auth.admit("ops")
    token = auth.admit("ci")
    request = {"WatchJob": pb.WatchJobRequest(id="a"), "WatchJobs": pb.WatchJobsRequest()}[method]

    async def scenario(stub):
        await create(stub, token, id="a")
        watches = [getattr(stub, method)(request, metadata=bearer(token)) for _ in range(3)]
        for watch in watches:
            await watch.read()
        auth.remove("ci")
        ends = [await end_of(watch) for watch in watches]
        again = getattr(stub, method)(request, metadata=bearer(auth.tokens["ops"]))
        assert await again.read()
        return set(ends)

    assert run(scenario, max_watchers=3) == {("UNAUTHENTICATED", "BAD_IDENTITY")}


def test_a_slow_reader_ends_too(auth, run):
    auth.admit("ops")
    token = auth.admit("ci")

    async def scenario(stub):
        await create(stub, token, id="a", result={"text": "x" * 60_000})
        watch = stub.WatchJobs(pb.WatchJobsRequest(), metadata=bearer(token))
        for number in range(100):
            await create(stub, token, id=f"b{number}", result={"text": "x" * 60_000})
        await asyncio.sleep(0.2)
        auth.remove("ci")
        return await end_of(watch)

    assert run(scenario) == ("UNAUTHENTICATED", "BAD_IDENTITY")


@pytest.mark.slow
def test_a_hundred_changes_of_the_file_fail_no_call_and_end_no_watch(auth, run):
    token = auth.admit("ci")

    async def call_until(stub, is_over):
        while not is_over.is_set():
            await stub.GetJob(pb.GetJobRequest(id="a"), metadata=bearer(token))

    async def scenario(stub):
        await create(stub, token, id="a")
        is_over = asyncio.Event()
        async with watching(stub, token) as watch:
            callers = [asyncio.ensure_future(call_until(stub, is_over)) for _ in range(4)]
            for number in range(100):
                added = auth.admit("other", expires_at=datetime(2100 + number, 1, 1, tzinfo=timezone.utc))
                auth.tokens.pop("other")
                await until_answered(functools.partial(create, stub, added), seconds=LONGEST_SECONDS)
            is_over.set()
            await asyncio.gather(*callers)
            await stub.CancelJob(pb.CancelJobRequest(id="a"), metadata=bearer(token))
            return (await watch.read()).event.job.done

    assert run(scenario) is True


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_clients_watch_raises_at_once_when_its_caller_is_removed(auth, serve, kind):
    auth.admit("ops")
    token = auth.admit("ci")
    service = serve("--auth", str(auth.path))
    with contextlib.closing(Callers(service, auth)) as callers:
        callers["ops"].create(id="a")

    def watch():
        with JobStatusClient(service.address, token=token) as client:
            for _ in client.watch("a"):
                auth.remove("ci")

    async def watch_async():
        async with AsyncJobStatusClient(service.address, token=token) as client:
            async for _ in client.watch("a"):
                auth.remove("ci")

    started = time.monotonic()
    with pytest.raises(BadIdentityError, match="the token is not known here, or was revoked"):
        watch() if kind == "sync" else asyncio.run(watch_async())
    assert time.monotonic() - started < LONGEST_SECONDS
