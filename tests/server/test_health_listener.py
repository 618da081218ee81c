"""`--health HOST:PORT`: health without TLS, for probes such as kubelet's."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server.config import ServerConfig
from tests.support.certificates import Authority
from tests.support.servers import TRANSPORT


@pytest.fixture
def serve_health(serve, tmp_path):
    """Start a server, and return it and the channel of a probe."""
    channels = []

    def start(*flags, **settings):
        log = tmp_path / "log"
        service = serve("--health", "127.0.0.1:0", *flags, log=log, **settings)
        while (found := re.search(r'health on ([\d.:]+)"', log.read_text())) is None:
            time.sleep(0.01)  # a thread writes the log
        channels.append(grpc.insecure_channel(found[1]))
        return service, channels[-1]

    yield start
    for channel in channels:
        channel.close()


def status_of(channel):
    health: Any = health_pb2_grpc.HealthStub(channel)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(health.Check(health_pb2.HealthCheckRequest()).status)


def test_health_is_served_until_the_drain(serve_health):
    service, channel = serve_health()
    health: Any = health_pb2_grpc.HealthStub(channel)
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert [next(watch).status, status_of(channel)] == [health_pb2.HealthCheckResponse.SERVING, "SERVING"]
    service.process.signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_nothing_but_health_is_served(serve_health, refused):
    _, channel = serve_health()
    stub: Any = JobStatusServiceStub(channel)
    assert refused(stub.GetJob, pb.GetJobRequest(id="a")).code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.skipif(TRANSPORT == "native", reason="the native transport has no TLS")
def test_a_server_with_tls_serves_health_without(serve_health, auth, tmp_path):
    auth.admit("robot")
    cert, key = Authority().issue().write(tmp_path, "server")
    _, channel = serve_health("--auth", str(auth.path), "--tls-cert", cert, "--tls-key", key)
    assert status_of(channel) == "SERVING"


def test_an_address_beyond_loopback_needs_neither_tls_nor_insecure():
    ServerConfig(health="0.0.0.0:50052").check()
    with pytest.raises(CannotStartError, match="--health 50052 is not an address"):
        ServerConfig(health="50052").check()
