"""deploy/proxies: each proxy runs with its file in front of two servers on PostgreSQL, with TLS on both sides."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf.duration_pb2 import Duration
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc import JobNotFoundError, JobStatusClient, Tls
from tests.support.auth import AuthText, bearer
from tests.support.certificates import Authority
from tests.support.postgres import VERSIONS
from tests.support.servers import ServerProcess
from tests.support.service import read_refusal

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

COMMANDS = {
    "envoy": ["-c", "envoy.yaml", "--disable-hot-restart", "--log-level", "warning"],
    "nginx": ["-p", ".", "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off; pid nginx.pid;"],
    "haproxy": ["-db", "-f", "haproxy.cfg"],
    "caddy": ["run", "--config", "Caddyfile"],
    "traefik": ["--configfile=traefik.yaml"],
}
"""Each proxy's arguments, in a folder with the files of deploy/proxies."""

SILENCE_SECONDS = 75
"""Longer than the default timeouts of all: 15 s of Envoy for a call, 60 s of nginx and Traefik."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Two servers, what their callers need, and the ports of the proxies in front."""

    servers: list[ServerProcess]
    ports: dict[str, int]
    tls: Tls
    ca: bytes
    token: str

    def client(self, name: str) -> JobStatusClient:
        """Return a client that calls through a proxy."""
        return JobStatusClient(f"localhost:{self.ports[name]}", tls=self.tls, token=self.token, timeout_seconds=30)

    def channel(self, name: str) -> grpc.Channel:
        """Return a bare channel through a proxy, on which nothing is retried."""
        return grpc.secure_channel(f"localhost:{self.ports[name]}", grpc.ssl_channel_credentials(self.ca))


@pytest.fixture(scope="module")
def site(root, program, free_port, postgres_shared, tmp_path_factory):
    """Start two servers, and all proxies that are installed, and wait until they serve."""
    folder = tmp_path_factory.mktemp("site")
    authority, auth = Authority(), AuthText(folder / "auth.toml")
    token = auth.admit("robot")
    (folder / "ca.crt").write_bytes(authority.pem)
    front = authority.issue()
    (folder / "tls.crt").write_bytes(front.cert)
    (folder / "tls.key").write_bytes(front.key)
    cert, key = authority.issue(name="jobstatus").write(folder, "server")
    cluster = postgres_shared(next(iter(VERSIONS)))
    database = cluster.create_database()
    flags = ["--transport", "grpcio", "--auth", str(auth.path), "--tls-cert", cert, "--tls-key", key]
    with contextlib.ExitStack() as stack:
        stack.callback(cluster.drop_database, database)
        servers = [stack.enter_context(ServerProcess(*flags, store=cluster.url(database))) for _ in range(2)]
        ports = {}
        for name, arguments in COMMANDS.items():
            with contextlib.suppress(pytest.skip.Exception):
                command = [program(name), *arguments]
                ports[name] = free_port()
                place = folder / name
                place.mkdir()
                write_files(root / "deploy/proxies", place, ports[name], [server.address for server in servers])
                stack.enter_context(running(command, place))
        tls = Tls(ca_file=str(folder / "ca.crt"))
        made = Site(servers=servers, ports=ports, tls=tls, ca=authority.pem, token=token)
        for name in ports:
            with made.client(name) as client:
                client.whoami()  # is retried until the proxy serves
        yield made


def write_files(source: Path, place: Path, port: int, servers: list[str]) -> None:
    """Copy the files of all proxies, with the ports and folders of the test."""
    first, second = servers
    values = {
        "/etc/jobstatus/tls": str(place.parent),
        "/etc/traefik": str(place),
        "jobstatus-1:50051": first,
        "jobstatus-2:50051": second,
        "address: jobstatus, port_value: 50051": f"address: 127.0.0.1, port_value: {first.rpartition(':')[2]}",
        "50051": str(port),
    }
    for file in source.iterdir():
        text = file.read_text()
        for old, new in values.items():
            text = text.replace(old, new)
        (place / file.name).write_text(text)
    envoy = place / "envoy.yaml"
    config = yaml.safe_load(envoy.read_text())
    (group,) = config["static_resources"]["clusters"][0]["load_assignment"]["endpoints"]
    group["lb_endpoints"].append(copy.deepcopy(group["lb_endpoints"][0]))  # as if DNS had two addresses
    group["lb_endpoints"][1]["endpoint"]["address"]["socket_address"]["port_value"] = int(second.rpartition(":")[2])
    envoy.write_text(yaml.safe_dump(config))


@contextlib.contextmanager
def running(command, place):
    with subprocess.Popen(command, cwd=place, env={**os.environ, "HOME": str(place)}) as proxy:
        try:
            yield
        finally:
            proxy.terminate()


@pytest.fixture(params=list(COMMANDS))
def name(request, site, program):
    program(request.param)  # skips the test if it is missing
    return request.param


def test_calls_and_their_errors_pass(site, name):
    with site.client(name) as client:
        assert client.whoami().principal == "robot"
        with pytest.raises(JobNotFoundError):
            client.get("no-such-job")


def test_requests_of_3_mib_pass(site, name):
    update = pb.UpdateJobRequest(job=pb.JobStatus(id="no-such-job"))
    update.job.result.update({"text": "x" * 60_000})
    with site.channel(name) as channel:
        stub: Any = JobStatusServiceStub(channel)
        request = pb.BatchUpdateJobsRequest(updates=[update] * 50)
        assert len(stub.BatchUpdateJobs(request, metadata=bearer(site.token)).results) == 50


def test_every_error_arrives_with_its_details(site, name):
    """With `flush_interval -1`, Caddy loses the status of some."""
    too_long = pb.JobStatus(labels={f"label-{number}": "x" * 257 for number in range(60)})
    with site.channel(name) as channel:
        stub: Any = JobStatusServiceStub(channel)
        kinds = set()
        for _ in range(100):
            with pytest.raises(grpc.RpcError) as caught:
                stub.CreateJob(pb.CreateJobRequest(job=too_long), metadata=bearer(site.token))
            kinds.add(read_refusal(caught.value).kind)
        assert kinds == {("INVALID_ARGUMENT", "INVALID_FIELD")}


def test_watches_and_updates_survive_the_restart_of_each_server(site, name):
    with site.client(name) as client:
        job = client.create("through a proxy", state="in_progress")
        seen = []
        watching = threading.Thread(target=lambda: seen.extend(client.watch(job.id)))
        watching.start()
        for number, server in enumerate(site.servers):
            assert server.terminate() == 0
            client.update(job.id, progress=10.0 * (number + 1))
            server.start()
        client.update(job.id, state="succeeded")
        watching.join(30)
        assert seen[-1].done


def test_a_connection_carries_more_watches_than_by_default(site, name):
    """Caddy's limit of 250 cannot be set."""
    with site.client(name) as client, site.channel(name) as channel:
        job = client.create("through a proxy")
        stub: Any = JobStatusServiceStub(channel)
        count = 240 if name == "caddy" else 300
        streams = [stub.WatchJob(pb.WatchJobRequest(id=job.id), metadata=bearer(site.token)) for _ in range(count)]
        assert [next(stream).event.job.id for stream in streams] == [job.id] * count


@pytest.mark.slow
def test_a_watch_outlasts_the_timeouts_with_and_without_heartbeats(site):
    """Raw streams, because our client would resume them."""
    with contextlib.ExitStack() as stack:
        streams: dict[tuple[str, int], Any] = {}
        client = stack.enter_context(site.client(next(iter(site.ports))))
        job = client.create("silent", state="in_progress")
        for name in site.ports:
            stub: Any = JobStatusServiceStub(stack.enter_context(site.channel(name)))
            for heartbeat in (30, 600):
                request = pb.WatchJobRequest(id=job.id, heartbeat_interval=Duration(seconds=heartbeat))
                streams[name, heartbeat] = stub.WatchJob(request, metadata=bearer(site.token))
        assert {next(stream).event.job.done for stream in streams.values()} == {False}
        time.sleep(SILENCE_SECONDS)
        client.update(job.id, state="succeeded")
        ends = {key: [message.event.type for message in stream] for key, stream in streams.items()}
    beat, updated = pb.JOB_EVENT_TYPE_HEARTBEAT, pb.JOB_EVENT_TYPE_UPDATED
    assert ends == {key: [beat, beat, updated] if key[1] == 30 else [updated] for key in streams}
