from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_database import DescriptorDatabase
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.reflection_pb2 import (
    ExtensionRequest,
    ServerReflectionRequest,
    ServerReflectionResponse,
)
from jobstatus.v1 import job_status_pb2

from jobstatus_grpc.server.places import Places
from jobstatus_grpc.server.reflection import MAX_REQUEST_BYTES, SERVICE_NAMES, add_reflection
from tests.support.loop import on_a_loop
from tests.support.service import read_refusal

SERVICES = ("jobstatus.v1.JobStatusService", "grpc.health.v1.Health")
JOB_STATUS = "jobstatus/v1/job_status.proto"
HEALTH = health_pb2.DESCRIPTOR.name
EXTENSION = "jobstatus/test/extension.proto"
EXTENSION_NUMBER = 50_000
NEVER_BY_ITSELF_SECONDS = 3600.0


def extend_the_pool() -> None:
    """Add an extension to protobuf's default pool; no module of ours has one."""
    file = FileDescriptorProto(
        name=EXTENSION, package="jobstatus.test", dependency=["google/protobuf/descriptor.proto"]
    )
    file.extension.add(
        name="owner",
        number=EXTENSION_NUMBER,
        extendee=".google.protobuf.MethodOptions",
        type=FieldDescriptorProto.TYPE_STRING,
        label=FieldDescriptorProto.LABEL_OPTIONAL,
    )
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())


extend_the_pool()


class Serving:
    """A server with nothing but reflection, and a client of it."""

    def __init__(self, server: grpc.aio.Server, channel: grpc.aio.Channel, drain: asyncio.Event) -> None:
        self.server = server
        self.channel = channel
        self.drain = drain

    def open(self, service: str = SERVICE_NAMES[0]) -> Any:
        """A stream that takes serialised requests, so that malformed ones can be sent too."""
        method: Any = self.channel.stream_stream(
            f"/{service}/ServerReflectionInfo", response_deserializer=ServerReflectionResponse.FromString
        )
        return method()

    async def ask(self, request: ServerReflectionRequest) -> ServerReflectionResponse:
        stream = self.open()
        response = await ask(stream, request.SerializeToString())
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        return response

    async def files(self, request: ServerReflectionRequest) -> list[FileDescriptorProto]:
        response = await self.ask(request)
        return [
            FileDescriptorProto.FromString(file) for file in response.file_descriptor_response.file_descriptor_proto
        ]


async def ask(stream: Any, request: bytes) -> ServerReflectionResponse:
    await stream.write(request)
    response = await stream.read()
    assert isinstance(response, ServerReflectionResponse)
    return response


@asynccontextmanager
async def serve(places: Places | None = None) -> AsyncIterator[Serving]:
    server = grpc.aio.server()
    drain = asyncio.Event()
    add_reflection(server, SERVICES, drain=drain, places=places)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Serving(server, channel, drain)
    finally:
        drain.set()
        await server.stop(NEVER_BY_ITSELF_SECONDS)


def of_file(name: str) -> ServerReflectionRequest:
    return ServerReflectionRequest(file_by_filename=name)


def of_symbol(symbol: str) -> ServerReflectionRequest:
    return ServerReflectionRequest(file_containing_symbol=symbol)


def of_extension(message: str, number: int) -> ServerReflectionRequest:
    extension = ExtensionRequest(containing_type=message, extension_number=number)
    return ServerReflectionRequest(file_containing_extension=extension)


@pytest.mark.parametrize("service", SERVICE_NAMES)
@on_a_loop
async def test_both_versions_list_the_services_and_themselves(service: str) -> None:
    async with serve() as serving:
        request = ServerReflectionRequest(host="jobs.example.org", list_services="*")
        response = await ask(serving.open(service), request.SerializeToString())
        assert (response.valid_host, response.original_request) == ("jobs.example.org", request)
        listed = [entry.name for entry in response.list_services_response.service]
        assert listed == sorted((*SERVICES, *SERVICE_NAMES))


FILE_OF_SYMBOL = {
    "jobstatus": JOB_STATUS,
    "jobstatus.v1": JOB_STATUS,
    "jobstatus.v1.JobStatusService": JOB_STATUS,
    "jobstatus.v1.JobStatusService.WatchJob": JOB_STATUS,
    "jobstatus.v1.JobStatus": JOB_STATUS,
    "jobstatus.v1.JobStatus.state": JOB_STATUS,
    "jobstatus.v1.JobStatus.LabelsEntry": JOB_STATUS,
    "jobstatus.v1.JobStatus.LabelsEntry.key": JOB_STATUS,
    "jobstatus.v1.JobStatus._progress": JOB_STATUS,
    "jobstatus.v1.JobState": JOB_STATUS,
    "jobstatus.v1.JOB_STATE_FAILED": JOB_STATUS,
    "google.protobuf.Struct.fields": "google/protobuf/struct.proto",
    "google.rpc.ErrorInfo": "google/rpc/error_details.proto",
    "google.rpc.RetryInfo.retry_delay": "google/rpc/error_details.proto",
    "google.rpc.BadRequest.FieldViolation": "google/rpc/error_details.proto",
    "grpc.health.v1": HEALTH,
    "grpc.health.v1.Health.Watch": HEALTH,
    "grpc.health.v1.HealthCheckResponse.ServingStatus": HEALTH,
    "grpc.health.v1.HealthCheckResponse.NOT_SERVING": HEALTH,
    "grpc.reflection.v1.ServerReflection": "grpc_reflection/v1/reflection.proto",
    "grpc.reflection.v1.ServerReflectionRequest.message_request": "grpc_reflection/v1/reflection.proto",
    "grpc.reflection.v1alpha.ServerReflection": "grpc_reflection/v1alpha/reflection.proto",
    "jobstatus.test.owner": EXTENSION,
}


@pytest.mark.parametrize(("symbol", "file"), FILE_OF_SYMBOL.items())
@on_a_loop
async def test_a_symbol_is_found_in_its_file(symbol: str, file: str) -> None:
    async with serve() as serving:
        files = await serving.files(of_symbol(symbol))
        assert files[0].name == file


def every_name_in_the_api() -> list[str]:
    api = job_status_pb2.DESCRIPTOR
    messages = api.message_types_by_name.values()
    names = [method.full_name for service in api.services_by_name.values() for method in service.methods]
    names += [field.full_name for message in messages for field in message.fields]
    return names + [kind.full_name for kind in (*messages, *api.enum_types_by_name.values())]


@on_a_loop
async def test_every_name_in_the_api_is_found() -> None:
    async with serve() as serving:
        stream = serving.open()
        for name in every_name_in_the_api():
            response = await ask(stream, of_symbol(name).SerializeToString())
            assert not response.HasField("error_response"), name


@on_a_loop
async def test_a_file_comes_once_and_with_all_that_it_needs() -> None:
    async with serve() as serving:
        files = await serving.files(of_symbol("google.rpc.RetryInfo"))
        assert [file.name for file in files] == ["google/rpc/error_details.proto", "google/protobuf/duration.proto"]


@on_a_loop
async def test_our_files_keep_comments_and_json_names() -> None:
    async with serve() as serving:
        ours, *needed = await serving.files(of_file(JOB_STATUS))
        assert {file.name for file in needed} == set(ours.dependency)
        for file in (ours, *needed):
            assert any(location.leading_comments for location in file.source_code_info.location)
            assert all(field.json_name for message in file.message_type for field in message.field)


class Remote(DescriptorDatabase):
    """The files that a client gets for one symbol."""

    def __init__(self, files: list[FileDescriptorProto]) -> None:
        super().__init__()
        for file in files:
            self.Add(file)


@pytest.mark.parametrize("service", [*SERVICES, *SERVICE_NAMES])
@on_a_loop
async def test_a_client_can_build_a_service_from_the_answer(service: str) -> None:
    async with serve() as serving:
        pool = descriptor_pool.DescriptorPool(Remote(await serving.files(of_symbol(service))))
        described = pool.FindServiceByName(service)
        assert all(method.input_type.full_name and method.output_type.full_name for method in described.methods)


@on_a_loop
async def test_an_extension_is_found_by_its_number() -> None:
    async with serve() as serving:
        files = await serving.files(of_extension("google.protobuf.MethodOptions", EXTENSION_NUMBER))
        assert [file.name for file in files] == [EXTENSION, "google/protobuf/descriptor.proto"]


@pytest.mark.parametrize(
    ("message", "numbers"), [("google.protobuf.MethodOptions", [EXTENSION_NUMBER]), ("jobstatus.v1.JobStatus", [])]
)
@on_a_loop
async def test_a_known_message_has_the_numbers_of_its_extensions(message: str, numbers: list[int]) -> None:
    async with serve() as serving:
        answer = await serving.ask(ServerReflectionRequest(all_extension_numbers_of_type=message))
        assert answer.all_extension_numbers_response.base_type_name == message
        assert set(answer.all_extension_numbers_response.extension_number) >= set(numbers)


UNKNOWN = [
    of_file(""),
    of_file("jobstatus/v2/job_status.proto"),
    of_symbol(""),
    of_symbol(".jobstatus.v1.JobStatus"),
    of_symbol("jobstatus.v1.JobStatus."),
    of_symbol("jobstatus.v1.JobStatus.nothing"),
    of_symbol("jobstatus.v1.JobStatusService.Nothing"),
    of_symbol("jobstatus.v1.JobState.JOB_STATE_FAILED"),
    of_extension("jobstatus.v1.JobStatus", 1),
    of_extension("jobstatus.v1.Nothing", 1),
    of_extension("google.protobuf.MethodOptions", -1),
    ServerReflectionRequest(all_extension_numbers_of_type="jobstatus.v1.Nothing"),
]


@pytest.mark.parametrize("request_", UNKNOWN, ids=lambda request: str(request).strip())
@on_a_loop
async def test_the_unknown_is_an_answer_of_not_found(request_: ServerReflectionRequest) -> None:
    async with serve() as serving:
        response = await serving.ask(request_)
        assert response.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        assert response.original_request == request_


TOO_LARGE = ServerReflectionRequest(file_by_filename="x" * MAX_REQUEST_BYTES).SerializeToString()


@pytest.mark.parametrize(
    "request_", [b"", ServerReflectionRequest(host="h").SerializeToString(), b"\x1a\x01\xff", TOO_LARGE]
)
@on_a_loop
async def test_a_request_for_nothing_is_refused_and_the_next_one_answered(request_: bytes) -> None:
    async with serve() as serving:
        stream = serving.open()
        refusal = await ask(stream, request_)
        assert refusal.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        answer = await ask(stream, of_file(JOB_STATUS).SerializeToString())
        assert answer.HasField("file_descriptor_response")


@on_a_loop
async def test_streams_beyond_the_limit_are_refused_until_one_ends() -> None:
    request = ServerReflectionRequest(list_services="*").SerializeToString()
    async with serve(Places(9)) as serving:
        streams = [serving.open() for _ in range(8)]
        for stream in streams:
            await ask(stream, request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving.open().read()
        refusal = read_refusal(caught.value)
        assert (refusal.kind, refusal.retry_seconds) == (("RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS"), 0.1)
        await streams[0].done_writing()
        assert await streams[0].read() is grpc.aio.EOF
        assert (await ask(serving.open(), request)).HasField("list_services_response")


@on_a_loop
async def test_a_stream_ends_with_its_client() -> None:
    async with serve() as serving:
        stream = serving.open()
        await ask(stream, of_file(JOB_STATUS).SerializeToString())
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK
        await serving.server.stop(NEVER_BY_ITSELF_SECONDS)


@on_a_loop
async def test_an_idle_stream_does_not_hold_up_the_drain() -> None:
    async with serve() as serving:
        stream = serving.open()
        await ask(stream, of_file(JOB_STATUS).SerializeToString())
        serving.drain.set()
        assert await stream.code() is grpc.StatusCode.OK
        await serving.server.stop(NEVER_BY_ITSELF_SECONDS)


@on_a_loop
async def test_a_service_without_a_definition_is_refused_at_the_start() -> None:
    with pytest.raises(KeyError):
        add_reflection(grpc.aio.server(), ["jobstatus.v1.Nobody"], drain=asyncio.Event())


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_closed_reflection_is_unimplemented(serve, transport):
    service = serve("--transport", transport, "--closed-reflection")
    method = service.channel.stream_stream(f"/{SERVICE_NAMES[0]}/ServerReflectionInfo")
    with pytest.raises(grpc.RpcError) as caught:
        next(method(iter([b""])))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert service.create(id="a").id == "a"
