"""The row of the HTTP gateway: calls in JSON and streams over HTTP/1.1, beside the same over gRPC."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from jobstatus.v1 import job_status_pb2 as pb

from benchmarks.load.client import Client
from benchmarks.load.http1 import Callers, Followers, NextRequest, request
from benchmarks.report import EACH, Table, Target, at_quantile, row
from benchmarks.rows.watching import Audience
from benchmarks.servers import GRPCIO, OURS, Bench, Server, free_port, numbered_jobs

SERVICE = "/jobstatus.v1.JobStatusService"
CALLERS = 64
SLICE_SECONDS = 0.5
CHANGES = 10
PAUSE_SECONDS = 0.25
GRPC, CONNECT, PLAIN, ENVOY = "gRPC", "Connect", "plain JSON", "Envoy"
READ, UPDATE = "GetJob", "UpdateJob"
STREAMS = ("Connect", "server-sent events")


@row("web", "JSON and streams over HTTP/1.1")
def web(bench: Bench, table: Table) -> None:
    """64 callers, each with a connection, read or update a job each: as Connect in JSON, as plain JSON, and, where it
    is installed, through Envoy's transcoder, which shares the server's core and is counted with it; in turns with 64
    calls of gRPC in flight to the same server. The part of gRPC's rate is that of a busy core: gRPC's CPU time for a
    call, by that of the HTTP gateway. Then the streams of one job, and single changes of it.
    """
    for _ in range(bench.plan.repetitions):
        for side in bench.among(*OURS):
            port = free_port()
            with bench.run(side, None, "--http", f"127.0.0.1:{port}") as server:
                table.add(side, calls(bench, server, port, has_envoy=side == GRPCIO))
                table.add(side, streams(bench, server, port))
    for method, way in itertools.product((READ, UPDATE), (CONNECT, PLAIN)):
        table.expect(part(method, way), f"{method}, {way}, part of gRPC's rate", Target(GRPCIO, "≥", 0.5))
    for way in STREAMS:
        goal = f"one change to {bench.plan.audience:,} streams, {way}, p99, times that of gRPC"
        table.expect(f"{way}: times as long as gRPC, p99", goal, Target(EACH, "≤", 3))
        table.expect(f"{way}: memory of each stream, kB", f"{way}, memory of a stream, kB", Target(EACH, "≤", 60))


def part(method: str, way: str) -> str:
    return f"{method}, {way}: part of gRPC's rate"


def calls(bench: Bench, server: Server, port: int, *, has_envoy: bool) -> Mapping[str, float]:
    """Measure unary calls in turns."""
    job_ids = numbered_jobs(CALLERS)
    server.create(job_ids)
    turns = max(1, round(bench.plan.seconds / SLICE_SECONDS))
    with contextlib.ExitStack() as stack:
        ways = {CONNECT: (port, server.process), PLAIN: (port, server.process)}
        if has_envoy and (program := shutil.which("envoy", path=str(Path(sys.executable).parent))):
            ways[ENVOY] = stack.enter_context(envoy(bench, program, server))
        costs: dict[tuple[str, str], list[float]] = {}
        rates: dict[tuple[str, str], list[float]] = {}
        for _, method in itertools.product(range(turns), (READ, UPDATE)):
            for way in (GRPC, *ways):
                others = [ways[way][1]] if way == ENVOY else []
                before, started = cpu_seconds(server, others), time.perf_counter()
                if way == GRPC:
                    count = grpc_calls(server, method, job_ids)
                else:
                    with Callers(ways[way][0], [lane(way, method, job_id) for job_id in job_ids]) as callers:
                        count = len(callers.measure(SLICE_SECONDS))
                rates.setdefault((method, way), []).append(count / (time.perf_counter() - started))
                used = cpu_seconds(server, others) - before
                if count:
                    costs.setdefault((method, way), []).append(used / count)
    figures: dict[str, float] = {}
    for (method, way), taken in costs.items():
        cost = at_quantile(taken, 0.5)
        figures[f"{method}, {way}: calls/s"] = at_quantile(rates[method, way], 0.5)
        figures[f"{method}, {way}: server CPU, µs a call"] = cost * 1e6
        if way != GRPC:
            figures[part(method, way)] = at_quantile(costs[method, GRPC], 0.5) / cost
    return figures


def cpu_seconds(server: Server, others: Sequence[psutil.Process]) -> float:
    """Return the CPU time of the server and of the processes before it."""
    return server.cpu_seconds() + sum(each.user + each.system for each in (other.cpu_times() for other in others))


def grpc_calls(server: Server, method: str, job_ids: Sequence[str]) -> int:
    """Load the server over gRPC for a turn; return the number of calls."""
    api = server.api
    path = api.read if method == READ else api.update
    reads = [itertools.repeat(api.read_request(job_id)).__next__ for job_id in job_ids]
    lanes: Sequence[NextRequest] = reads if method == READ else [api.updates([job_id]) for job_id in job_ids]
    with Client(server.address, connections=8) as client, client.load(path, lanes) as load:
        return len(load.measure(SLICE_SECONDS))


_progress = itertools.count()


def lane(way: str, method: str, job_id: str) -> NextRequest:
    """Return what makes the next request of a caller; each update is a change."""
    if method == READ:
        plain = request("GET", f"/v1/jobs/{job_id}")
        connect = request("POST", f"{SERVICE}/GetJob", json.dumps({"id": job_id}).encode())
        return itertools.repeat(plain if way == PLAIN else connect).__next__

    def next_update() -> bytes:
        job = {"reason": "copying /srv/data", "progress": 10 + next(_progress) * 1e-5}
        if way == PLAIN:
            return request("PATCH", f"/v1/jobs/{job_id}?attempt=1", json.dumps(job).encode())
        body = {"job": {"id": job_id, **job}, "attempt": 1}
        return request("POST", f"{SERVICE}/UpdateJob", json.dumps(body).encode())

    return next_update


def streams(bench: Bench, server: Server, port: int) -> Mapping[str, float]:
    """Measure single changes to many streams, and the memory of the streams."""
    count = bench.plan.audience
    figures: dict[str, float] = {}
    with Audience(server, ["watched"], count) as audience:
        audience.open(count)
        audience.change("warming up")
        taken: list[float] = []
        for number in range(CHANGES):
            audience.run_for(PAUSE_SECONDS)
            taken += audience.change(f"change {number} over gRPC")
    over_grpc = at_quantile(taken, 0.99)
    figures["gRPC: until a stream has a change, p99, ms"] = over_grpc * 1e3
    message = json.dumps({"id": "watched"}).encode()
    frame = b"\0" + len(message).to_bytes(4, "big") + message
    connect = request("POST", f"{SERVICE}/WatchJob", frame, "application/connect+json")
    requests = (connect, request("GET", "/v1/jobs/watched/events"))
    for way, first in zip(STREAMS, requests, strict=True):
        with Followers(port) as followers:
            followers.open(first, 20, until=b"watched")  # what is allocated once does not count
            before = server.memory_bytes()
            followers.open(first, count - 20, until=b"watched")
            memory = (server.memory_bytes() - before) / (count - 20)
            seconds: list[float] = []
            for number in range(CHANGES + 1):
                time.sleep(PAUSE_SECONDS)
                mark = f"change {number} over {way}"
                with Client(server.address) as client:  # a new one: it answers pings only while it calls
                    client.call(server.api.read, server.api.read_request("watched"))
                    started = time.perf_counter()
                    client.call(server.api.update, server.api.marked_request("watched", mark))
                reached_at = followers.wait_for(mark.encode())
                seconds += [each - started for each in reached_at] if number else []
        figures[f"{way}: until a stream has a change, p99, ms"] = at_quantile(seconds, 0.99) * 1e3
        figures[f"{way}: times as long as gRPC, p99"] = at_quantile(seconds, 0.99) / over_grpc
        figures[f"{way}: memory of each stream, kB"] = memory / 1e3
    return figures


@contextlib.contextmanager
def envoy(bench: Bench, program: str, server: Server) -> Iterator[tuple[int, psutil.Process]]:
    """Run Envoy with its transcoder in front of a server, on the server's core; yield its port and its process."""
    port, host_and_port = free_port(), server.address.rpartition(":")
    with bench.folder() as folder:
        (folder / "envoy.json").write_text(json.dumps(_envoy_config(port, int(host_and_port[2]))))
        command = [program, "-c", str(folder / "envoy.json"), "--disable-hot-restart", "--concurrency", "1"]
        with bench.cores.for_servers(), (folder / "log").open("wb") as log:
            process = subprocess.Popen([*command, "--log-level", "error"], stdout=log, stderr=log)
        with process:
            try:
                until = time.monotonic() + 20
                while True:
                    try:
                        with Callers(port, [lane(ENVOY, READ, numbered_jobs(1)[0])]) as callers:
                            callers.measure(0.05)
                        break
                    except OSError:
                        if time.monotonic() > until or process.poll() is not None:
                            raise RuntimeError(f"Envoy did not start: {(folder / 'log').read_text()}") from None
                        time.sleep(0.1)
                yield port, psutil.Process(process.pid)
            finally:
                process.terminate()


def _envoy_config(port: int, upstream_port: int) -> Mapping[str, object]:
    descriptors = Path(pb.__file__).with_name("descriptor_set.binpb")
    package = "envoy.extensions"
    types = f"type.googleapis.com/{package}"
    transcoder = {
        "@type": f"{types}.filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "proto_descriptor": str(descriptors),
        "services": [SERVICE[1:]],
        "auto_mapping": True,
    }
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "web",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "server"}}],
                }
            ]
        },
        "http_filters": [
            {"name": "transcoder", "typed_config": transcoder},
            {"name": "router", "typed_config": {"@type": f"{types}.filters.http.router.v3.Router"}},
        ],
    }
    http2 = {
        "@type": f"{types}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "address": _socket_address(port),
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [
                {
                    "name": "server",
                    "type": "STATIC",
                    "typed_extension_protocol_options": {f"{package}.upstreams.http.v3.HttpProtocolOptions": http2},
                    "load_assignment": {
                        "cluster_name": "server",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _socket_address(upstream_port)}}]}],
                    },
                }
            ],
        }
    }


def _socket_address(port: int) -> Mapping[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
