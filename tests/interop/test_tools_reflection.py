"""grpcurl and buf curl against a server, without its .proto files."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import platform
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from jobstatus_grpc.server import health, reflection
from jobstatus_grpc.server.transports import grpcio
from tests.support.loop import on_a_loop

SERVICES = (health.SERVICE, health.SERVICE_NAME)
REFUSAL = error_details_pb2.ErrorInfo(reason="JOB_NOT_FOUND", domain="jobstatus.v1", metadata={"id": "7"})

needs_grpcurl = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="PyPI has grpcurl for Linux on x86-64 only"
)


class Tools:
    """grpcurl and buf as installed beside this Python, with a home of their own."""

    def __init__(self, home: Path) -> None:
        self._environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home), "BUF_CACHE_DIR": str(home)}

    async def grpcurl(self, *arguments: str) -> tuple[int, str, str]:
        return await self._run("grpcurl", "-plaintext", *arguments)

    async def buf_curl(self, *arguments: str) -> tuple[int, str, str]:
        return await self._run("buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments)

    async def _run(self, name: str, *arguments: str) -> tuple[int, str, str]:
        """Returns the exit code, standard output and standard error."""
        path = shutil.which(name, path=str(Path(sys.executable).parent))
        assert path is not None, f"{name} is missing: make setup installs it"
        process = await asyncio.create_subprocess_exec(
            path,
            *arguments,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        assert process.returncode is not None
        return process.returncode, output.decode(), errors.decode()


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


async def refuse(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    status = status_pb2.Status(code=code_pb2.NOT_FOUND, message="no such job")
    status.details.add().Pack(REFUSAL)
    await context.abort_with_status(rpc_status.to_status(status))


@asynccontextmanager
async def serve() -> AsyncIterator[str]:
    """Serves health, reflection and a GetJob that always refuses; yields the address."""
    server = grpc.aio.server()
    drain = asyncio.Event()
    statuses = health.HealthServicer(SERVICES)
    statuses.set(health.SERVICE, health.SERVING)
    grpcio.add_methods(server, health.methods(statuses))
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"GetJob": grpc.unary_unary_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(health.SERVICE, methods),))
    reflection.add_reflection(server, SERVICES, drain=drain)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        drain.set()
        await server.stop(None)


@needs_grpcurl
@on_a_loop
async def test_grpcurl_lists_the_services(tools: Tools) -> None:
    async with serve() as address:
        code, output, _ = await tools.grpcurl(address, "list")
        assert (code, output.split()) == (0, sorted((*SERVICES, *reflection.SERVICE_NAMES)))


@needs_grpcurl
@on_a_loop
async def test_grpcurl_describes_every_service_with_its_comments(tools: Tools) -> None:
    async with serve() as address:
        code, output, _ = await tools.grpcurl(address, "describe")
        assert code == 0
        assert [line.split()[0] for line in output.splitlines() if line.endswith(" is a service:")] == sorted(
            (*SERVICES, *reflection.SERVICE_NAMES)
        )
        assert "// Stores the status of jobs and streams it." in output
        assert "  // Returns a job as of the latest committed write." in output


DESCRIBED = {
    "jobstatus.v1.JobStatusService.WatchJob": "rpc WatchJob ( .jobstatus.v1.WatchJobRequest ) returns ( stream ",
    "jobstatus.v1.JobStatus": "  // In percent, 0 to 100.",
    "jobstatus.v1.JobStatus.cancel_requested": "bool cancel_requested = 15;",
    "jobstatus.v1.JobState": "JOB_STATE_CANCELLED = 7;",
    "google.protobuf.Timestamp": "// Represents seconds of UTC time since Unix epoch",
    "google.rpc.ErrorInfo": "map<string, string> metadata = 3;",
    "google.rpc.RetryInfo": ".google.protobuf.Duration retry_delay = 1;",
    "google.rpc.BadRequest": "repeated .google.rpc.BadRequest.FieldViolation field_violations = 1;",
    "grpc.health.v1.HealthCheckResponse.ServingStatus": "NOT_SERVING = 2;",
    "grpc.reflection.v1.ServerReflectionRequest": "string file_containing_symbol = 4;",
}


@needs_grpcurl
@pytest.mark.parametrize(("symbol", "text"), DESCRIBED.items())
@on_a_loop
async def test_grpcurl_describes_a_symbol(tools: Tools, symbol: str, text: str) -> None:
    async with serve() as address:
        code, output, _ = await tools.grpcurl(address, "describe", symbol)
        assert code == 0
        assert text in output


@needs_grpcurl
@on_a_loop
async def test_grpcurl_reads_why_a_call_was_refused(tools: Tools) -> None:
    async with serve() as address:
        code, _, errors = await tools.grpcurl("-d", '{"id": "7"}', address, f"{health.SERVICE}/GetJob")
        assert code == 64 + code_pb2.NOT_FOUND
        assert '"@type":"type.googleapis.com/google.rpc.ErrorInfo"' in errors
        assert '"reason":"JOB_NOT_FOUND"' in errors


@needs_grpcurl
@on_a_loop
async def test_grpcurl_checks_health(tools: Tools) -> None:
    request = json.dumps({"service": health.SERVICE})
    async with serve() as address:
        code, output, _ = await tools.grpcurl("-d", request, address, f"{health.SERVICE_NAME}/Check")
        assert (code, json.loads(output)) == (0, {"status": "SERVING"})


@pytest.mark.parametrize("version", ["grpc-v1", "grpc-v1alpha"])
@on_a_loop
async def test_buf_curl_lists_the_methods(tools: Tools, version: str) -> None:
    async with serve() as address:
        code, output, _ = await tools.buf_curl("--reflect-protocol", version, "--list-methods", f"http://{address}")
        assert code == 0
        assert {f"{health.SERVICE}/GetJob", f"{health.SERVICE_NAME}/Watch"} <= set(output.split())


@pytest.mark.parametrize("version", ["grpc-v1", "grpc-v1alpha"])
@on_a_loop
async def test_buf_curl_checks_health(tools: Tools, version: str) -> None:
    request = json.dumps({"service": health.SERVICE})
    async with serve() as address:
        url = f"http://{address}/{health.SERVICE_NAME}/Check"
        code, output, _ = await tools.buf_curl("--reflect-protocol", version, "--data", request, url)
        assert (code, json.loads(output)) == (0, {"status": "SERVING"})


@on_a_loop
async def test_buf_curl_reads_why_a_call_was_refused(tools: Tools) -> None:
    async with serve() as address:
        code, _, errors = await tools.buf_curl("--data", '{"id": "7"}', f"http://{address}/{health.SERVICE}/GetJob")
        assert code != 0
        (detail,) = json.loads(errors)["details"]
        assert detail["type"] == "google.rpc.ErrorInfo"
        assert error_details_pb2.ErrorInfo.FromString(base64.b64decode(detail["value"] + "==")) == REFUSAL
