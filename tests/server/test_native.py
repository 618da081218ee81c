"""`--transport native`: behaves as grpcio does. `make test-native` runs the other tests on it too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from jobstatus.v1 import job_status_pb2 as pb

from tests.support.service import end_by_signal

pytest.importorskip("pygrpc_native", reason="pygrpc-native is not built for this Python")

NATIVE = ("--transport", "native")
GET = "/jobstatus.v1.JobStatusService/GetJob"
READERS = 20
PLACES = READERS + 3
"""One host gets READERS + 1 of them."""
MIB = 1024 * 1024
NONE = duration_pb2.Duration()


@pytest.fixture(scope="module")
def service(serve_module):
    return serve_module(*NATIVE, "--max-watchers", str(PLACES))


def start(*arguments, **environment):
    """Run `jobstatus serve`, which must exit at once."""
    command = [sys.executable, "-m", "jobstatus_grpc", "serve", "--store", "memory:", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=20, check=False
    )


def test_a_watch_gets_the_end_and_ends_with_ok(service, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id())
    streams = [service.watch(job.id) for _ in range(READERS)]
    assert [next(stream).event.job for stream in streams] == [job] * READERS
    end = service.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert [[message.event.job for message in stream] for stream in streams] == [[end]] * READERS


@pytest.mark.parametrize("call", ["get", "watch"])
def test_an_error_carries_its_details(service, refused, call):
    error = refused(lambda: service.get("nobody") if call == "get" else list(service.watch("nobody")))
    assert error.kind == ("NOT_FOUND", "JOB_NOT_FOUND")
    assert (error.message, error.metadata) == ("no job has the id 'nobody'", {"id": "nobody"})


def test_every_violation_is_reported_whatever_it_quotes(service, refused, update_of):
    error = refused(service.stub.UpdateJob, update_of("ü/ñ", reason="a\0b", progress=101))
    assert error.kind == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert len(error.fields) == 3


def test_the_caller_is_in_the_history(service, new_id):
    job = service.create(id=new_id())
    history = service.stub.ListJobTransitions(pb.ListJobTransitionsRequest(id=job.id))
    assert history.transitions[0].actor.startswith("ipv4:127.0.0.1:")


def test_health_is_answered_and_watched(service):
    health: Any = health_pb2_grpc.HealthStub(service.channel)
    request = health_pb2.HealthCheckRequest(service="jobstatus.v1.JobStatusService")
    watch = health.Watch(request)
    assert health.Check(request).status == next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    with pytest.raises(grpc.RpcError, match="unknown service"):
        health.Check(health_pb2.HealthCheckRequest(service="other"))


def test_reflection_is_answered(service):
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(service.channel)
    (answer,) = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {each.name for each in answer.list_services_response.service}
    assert {"jobstatus.v1.JobStatusService", "grpc.health.v1.Health"} < names


@pytest.mark.parametrize("method", ["/jobstatus.v1.JobStatusService/Nothing", "/other.Service/Get"])
def test_an_unknown_method_is_unimplemented(service, method):
    with pytest.raises(grpc.RpcError) as caught:
        service.channel.unary_unary(method)(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_metadata_that_grpcio_takes_are_taken_and_more_are_refused(service):
    get = service.channel.unary_unary(GET)
    codes = []
    for size in (16_000, 30_000):
        with pytest.raises(grpc.RpcError) as caught:
            get(b"\x0a\x06nobody", metadata=[("x-large", "x" * size)], timeout=20)
        codes.append(caught.value.code())
    assert codes == [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNKNOWN]


@pytest.mark.parametrize(("compression", "code"), [("Gzip", "NOT_FOUND"), ("Deflate", "UNIMPLEMENTED")])
def test_gzip_is_unpacked_and_deflate_is_refused(service, compression, code):
    body = pb.GetJobRequest(id="nobody").SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        service.channel.unary_unary(GET)(body, compression=grpc.Compression[compression], timeout=20)
    assert caught.value.code().name == code


def test_a_slow_reader_gets_the_newest_and_the_end_and_costs_the_others_nothing(service, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id(), result={"text": "x" * 60_000})
    slow, keen = (service.watch(job.id, min_update_interval=NONE) for _ in range(2))
    next(slow)
    next(keen)
    for number in range(300):
        job = service.update(job.id, labels={"n": str(number)})
        while next(keen).event.job.revision < job.revision:
            pass
    end = service.update(job.id, state="JOB_STATE_SUCCEEDED")
    jobs = [message.event.job for message in slow]
    assert jobs[-1] == end
    assert len(jobs) < 200
    assert [job.revision for job in jobs] == sorted({job.revision for job in jobs})


def test_a_watch_that_is_cancelled_frees_its_place_within_a_second(service, refused, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id())
    streams = [service.watch(job.id) for _ in range(READERS + 1)]
    for stream in streams:
        next(stream)
    assert refused(next, service.watch(job.id)).reason == "TOO_MANY_WATCHERS"
    for stream in streams:
        stream.cancel()
    deadline = time.monotonic() + 1
    while admitted(service, job) < READERS + 1:
        assert time.monotonic() < deadline


def admitted(service, job):
    """Open watches up to the limit, cancel them, and return how many were admitted."""
    streams = [service.watch(job.id) for _ in range(READERS + 1)]
    codes = [next(stream, None) and None if stream.is_active() else stream.code() for stream in streams]
    return codes.count(None)


def test_five_thousand_calls_leave_nothing_behind(service, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id())
    process = psutil.Process(service.process.pid)
    sizes = [0]
    # A burst that arrives at once, as on a busy machine, takes memory that the allocator keeps; a leak never ends.
    while len(sizes) < 10 or sizes[-1] - sizes[-6] >= 4 * MIB:
        assert len(sizes) < 50, sizes
        calls: list[Any] = [service.stub.GetJob.future(pb.GetJobRequest(id=job.id)) for _ in range(1000)]
        for number, stream in enumerate([service.watch(job.id) for _ in range(READERS)] * 50):
            calls[number].result()
            stream.cancel()
        sizes.append(process.memory_info().rss)
    assert process.num_threads() < 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_watches_with_a_retry_delay(serve, refused, tmp_path, number):
    path = tmp_path / "socket"
    service = serve(*NATIVE, "--listen", f"unix:{path}", "--drain-grace", "5s")
    assert end_by_signal(service, refused, number) < 3
    assert not path.exists()


@pytest.mark.parametrize("holder", ["grpcio", "native"])
@pytest.mark.parametrize("place", ["127.0.0.1:0", "unix:"])
def test_an_address_in_use_is_one_line_and_exit_2(serve, tmp_path, holder, place):
    listen = f"unix:{tmp_path}/socket" if place == "unix:" else place
    service = serve("--transport", holder, listen=listen)
    done = start(*NATIVE, "--listen", service.address, "--log-level", "error")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: cannot listen on {service.address}: another server listens there\n"
    assert service.create().revision == 1


def test_without_its_package_it_is_one_line_that_says_what_to_install():
    program = (
        "import sys; sys.modules['pygrpc_native'] = None; sys.argv = ['jobstatus', *sys.argv[1:]];"
        "from jobstatus_grpc.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "serve", "--store", "memory:", "--listen", "127.0.0.1:0", *NATIVE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "pip install 'jobstatus-grpc[native]'" in done.stderr


def test_the_variable_is_read_and_its_value_checked():
    done = start(JOBSTATUS_TRANSPORT="carrier-pigeon")
    assert done.returncode == 2
    assert "'carrier-pigeon' is not one of" in done.stderr
