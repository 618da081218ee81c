"""The database is suspended, is down, or starts late: calls fail soon, watches stay, everything recovers by itself."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.server.health import WRITE
from tests.support.postgres import PostgresCluster
from tests.support.servers import ServerProcess
from tests.support.service import Service
from tests.support.timing import MAX_PAUSE_SECONDS, rerun_after_pause

pytestmark = pytest.mark.slow

ANSWER_SECONDS = 3.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextlib.contextmanager
def standing_still(cluster: PostgresCluster) -> Iterator[None]:
    """Suspend all processes of a server during a block: a connection is accepted, and gets no answer."""
    assert cluster._process is not None
    postmaster = psutil.Process(cluster._process.pid)
    processes = [postmaster, *postmaster.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


@contextlib.contextmanager
def gone(cluster: PostgresCluster) -> Iterator[None]:
    cluster.kill()
    try:
        yield
    finally:
        cluster.start()


OUTAGES = [standing_still, gone]


@pytest.fixture
def database(new_postgres):
    return new_postgres.url(new_postgres.create_database())


@pytest.fixture
def server(database, tmp_path) -> Iterator[Service]:
    with ServerProcess(store=database, log=tmp_path / "log") as process:
        service = Service(process.address, process)
        yield service
        service.close()


def calls_on(service: Service, job_id: str) -> dict[str, Callable[[], object]]:
    return {
        "create": lambda: service.create(),
        "update": lambda: service.update(job_id, reason="r"),
        "cancel": lambda: service.cancel("c"),
        "get": lambda: service.get(job_id),
        "list": lambda: service.stub.ListJobs(pb.ListJobsRequest(), timeout=20),
        "history": lambda: service.stub.ListJobTransitions(pb.ListJobTransitionsRequest(id=job_id), timeout=20),
        **{f"update {number}": lambda: service.update(job_id, reason="r") for number in range(20)},
    }


def refusals_of(
    service: Service, job_id: str, read: Callable[[grpc.RpcError], object]
) -> dict[str, tuple[object, bool]]:
    """Make all calls at once; return the error of each, and whether it came in time."""

    def refused(call: Callable[[], object]) -> tuple[object, bool]:
        began_at = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            call()
        return read(caught.value), time.monotonic() - began_at < ANSWER_SECONDS + MAX_PAUSE_SECONDS

    calls = calls_on(service, job_id)
    with ThreadPoolExecutor(len(calls)) as pool:
        return dict(zip(calls, pool.map(refused, calls.values()), strict=True))


def read_into(events: queue.SimpleQueue[pb.JobEvent], watch: Any) -> None:
    with contextlib.suppress(grpc.RpcError):
        for response in watch:
            events.put(response.event)


@pytest.mark.parametrize("outage", OUTAGES)
@rerun_after_pause(0.5)
def test_calls_fail_within_3_s_watches_stay_open_and_all_recovers(new_postgres, server, outage, refusal, tmp_path):
    stub: Any = health_pb2_grpc.HealthStub(server.channel)
    health = stub.Watch(health_pb2.HealthCheckRequest(service=WRITE))
    while next(health).status != SERVING:
        pass
    job_id = server.create().id
    events: queue.SimpleQueue[pb.JobEvent] = queue.SimpleQueue()
    watch = server.watch(job_id, heartbeat_interval={"seconds": 1}, timeout=50)
    reading = threading.Thread(target=read_into, args=(events, watch))
    reading.start()
    assert events.get(timeout=20).job.id == job_id
    with outage(new_postgres):
        for _ in range(2):
            refusals = refusals_of(server, job_id, lambda error: refusal(error).kind)
            assert refusals == dict.fromkeys(refusals, (("UNAVAILABLE", "STORE_UNAVAILABLE"), True))
        assert next(health).status == NOT_SERVING
        while not events.empty():
            events.get()
        assert events.get(timeout=20).type == pb.JOB_EVENT_TYPE_HEARTBEAT
    assert next(health).status == SERVING
    server.job_in("SUCCEEDED")
    server.update(job_id, state="JOB_STATE_SUCCEEDED")
    while not events.get(timeout=20).job.done:
        pass
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_server_that_starts_while_its_database_recovers_waits_for_it(new_postgres, refused):
    database = new_postgres.url(new_postgres.create_database())
    with ServerProcess(store=database) as first:
        Service(first.address).create(id="a")
    standby = new_postgres.standby()
    new_postgres.kill()
    where = database.replace(f":{new_postgres.port}", f":{standby.port}")
    command = [sys.executable, "-m", "jobstatus_grpc", "serve", "--listen", "127.0.0.1:0", "--store", where]
    environment = {**os.environ, "JOBSTATUS_LOG_FORMAT": "text"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        assert "waiting for the database" in server.stderr.readline()
        standby.promote()
        service = Service(server.stdout.readline().removeprefix("listening on ").strip())
        assert service.get("a").id == "a"
        service.close()
        server.send_signal(signal.SIGTERM)
        server.communicate()
