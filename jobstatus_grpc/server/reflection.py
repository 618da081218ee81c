"""Server reflection, v1 and v1alpha, so that tools such as grpcurl need no .proto file.

Python's descriptor pool drops comments and JSON names, so the files of the shipped descriptor set are served as they
are, and the pool serves the rest: health, reflection itself, the details of errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from jobstatus_grpc.errors import TooManyRequestsError
from jobstatus_grpc.server.places import Places, host_of
from jobstatus_grpc.wire import status

__all__ = ["SERVICE_NAMES", "ReflectionServicer", "add_reflection"]

SERVICE_NAMES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

MAX_REQUEST_BYTES = 4096
"""Of a request: a name. The response repeats it."""

MAX_STREAMS = 1000
"""Open streams: they need no identity, and one takes 20 kB."""


@dataclass(frozen=True, slots=True)
class _File:
    descriptor: bytes
    dependencies: tuple[str, ...]


class _Files:
    """Files by name and symbol: those added, then those of protobuf's default pool, which has every extension.

    Each method raises KeyError for an unknown name.
    """

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._file_of_symbol: dict[str, str] = {}
        self._pool = descriptor_pool.Default()

    def add(self, file: FileDescriptorProto) -> None:
        """Serve `file`. A symbol that an earlier file defines too, such as their package, stays with that one."""
        self._files.setdefault(file.name, _File(file.SerializeToString(), tuple(file.dependency)))
        for symbol in _symbols(file):
            self._file_of_symbol.setdefault(symbol, file.name)

    def add_service(self, name: str) -> None:
        """Serve the file that defines a service of the pool, which has no lookup of services by symbol."""
        if name not in self._file_of_symbol:
            self.add(_pool_file(self._pool.FindServiceByName(name).file.name))

    def with_dependencies(self, name: str) -> list[bytes]:
        """Return the file descriptor `name` and, after it, all its dependencies, each once."""
        found: dict[str, _File] = {}
        missing = [name]
        while missing:
            name = missing.pop()
            if name not in found:
                found[name] = self._named(name)
                missing.extend(found[name].dependencies)
        return [file.descriptor for file in found.values()]

    def of_symbol(self, symbol: str) -> str:
        if symbol in self._file_of_symbol:
            return self._file_of_symbol[symbol]
        return str(self._pool.FindFileContainingSymbol(symbol).name)

    def of_extension(self, message: str, number: int) -> str:
        extended = self._pool.FindMessageTypeByName(message)
        return self.of_symbol(self._pool.FindExtensionByNumber(extended, number).full_name)

    def extension_numbers(self, message: str) -> list[int]:
        extended = self._pool.FindMessageTypeByName(message)
        return sorted(extension.number for extension in self._pool.FindAllExtensions(extended))

    def _named(self, name: str) -> _File:
        if name in self._files:
            return self._files[name]
        file = _pool_file(name)
        return _File(file.SerializeToString(), tuple(file.dependency))


class ReflectionServicer:
    """Describe `services`, each of which is in `descriptor_set` or an imported generated module, and reflection itself.

    `descriptor_set` is a serialised google.protobuf.FileDescriptorSet. Streams end with OK when their client
    half-closes, or when `drain` is set.

    Raises KeyError if a service is in neither.
    """

    def __init__(self, services: Iterable[str], *, descriptor_set: bytes, drain: asyncio.Event, places: Places) -> None:
        self._services = sorted({*services, *SERVICE_NAMES})
        self._drain = drain
        self._places = places
        self._files = _Files()
        for file in FileDescriptorSet.FromString(descriptor_set).file:
            self._files.add(file)
        self._files.add(_v1_file())
        self._files.add(_pool_file(error_details_pb2.DESCRIPTOR.name))
        for service in self._services:
            self._files.add_service(service)

    async def ServerReflectionInfo(
        self, requests: AsyncIterator[ServerReflectionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        host = host_of(context.peer())
        if not self._places.has(host):
            error = TooManyRequestsError("the server has reached its limit of streams of reflection; try again later")
            await context.abort(*status.status_of(error))
        self._places.take(host)
        draining = asyncio.ensure_future(self._drain.wait())
        try:
            while (request := await _next(requests, draining)) is not None:
                await context.write(self._answer(request))
        except grpc.aio.InternalError as error:
            # Raised when the client leaves during the write. grpcio logs a traceback for all but CancelledError.
            raise asyncio.CancelledError from error
        finally:
            self._places.free(host)
            draining.cancel()

    def _answer(self, request: ServerReflectionRequest) -> ServerReflectionResponse:
        response = ServerReflectionResponse(valid_host=request.host, original_request=request)
        try:
            self._fill(response, request)
        except KeyError:
            code, text = grpc.StatusCode.NOT_FOUND.value
            response.error_response.error_code = code
            response.error_response.error_message = text
        return response

    def _fill(self, response: ServerReflectionResponse, request: ServerReflectionRequest) -> None:
        files = response.file_descriptor_response.file_descriptor_proto
        match request.WhichOneof("message_request"):
            case "file_by_filename":
                files.extend(self._files.with_dependencies(request.file_by_filename))
            case "file_containing_symbol":
                name = self._files.of_symbol(request.file_containing_symbol)
                files.extend(self._files.with_dependencies(name))
            case "file_containing_extension":
                extension = request.file_containing_extension
                name = self._files.of_extension(extension.containing_type, extension.extension_number)
                files.extend(self._files.with_dependencies(name))
            case "all_extension_numbers_of_type":
                message = request.all_extension_numbers_of_type
                numbers = self._files.extension_numbers(message)
                response.all_extension_numbers_response.base_type_name = message
                response.all_extension_numbers_response.extension_number.extend(numbers)
            case "list_services":
                for service in self._services:
                    response.list_services_response.service.add(name=service)
            case _:
                code, text = grpc.StatusCode.INVALID_ARGUMENT.value
                response.error_response.error_code = code
                response.error_response.error_message = text


def add_reflection(
    server: grpc.aio.Server, services: Sequence[str], *, drain: asyncio.Event, places: Places | None = None
) -> None:
    """Describe `services` and their messages on `server`, which has not been started; see ReflectionServicer.

    Servers that take each other's place share `places`; by default there are MAX_STREAMS.
    """
    descriptor_set = resources.files("jobstatus.v1").joinpath("descriptor_set.binpb").read_bytes()
    reflection = ReflectionServicer(
        services, descriptor_set=descriptor_set, drain=drain, places=places or Places(MAX_STREAMS)
    )
    # v1 and v1alpha are the same on the wire.
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
            reflection.ServerReflectionInfo, _parse, ServerReflectionResponse.SerializeToString
        )
    }
    for name in SERVICE_NAMES:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


async def _next(
    requests: AsyncIterator[ServerReflectionRequest], draining: asyncio.Future[Any]
) -> ServerReflectionRequest | None:
    """Return the next request, or None once the client has half-closed or `draining` is done."""
    reading = asyncio.ensure_future(anext(requests, None))
    try:
        await asyncio.wait((reading, draining), return_when=asyncio.FIRST_COMPLETED)
        return reading.result() if reading.done() else None
    finally:
        reading.cancel()


def _parse(data: bytes) -> ServerReflectionRequest:
    """Return an empty request for one that is malformed or too large, to be answered with an error: an exception would
    end the stream.
    """
    if len(data) > MAX_REQUEST_BYTES:
        return ServerReflectionRequest()
    try:
        return ServerReflectionRequest.FromString(data)
    except DecodeError:
        return ServerReflectionRequest()


def _v1_file() -> FileDescriptorProto:
    """Return the definition of reflection v1, made from v1alpha: no Python package has it."""
    text = text_format.MessageToString(_pool_file(reflection_pb2.DESCRIPTOR.name)).replace("v1alpha", "v1")
    file = text_format.Parse(text, FileDescriptorProto())
    file.options.ClearField("deprecated")
    return file


def _pool_file(name: str) -> FileDescriptorProto:
    file = FileDescriptorProto()
    descriptor_pool.Default().FindFileByName(name).CopyToProto(file)
    return file


def _symbols(file: FileDescriptorProto) -> Iterator[str]:
    """Yield every full name that `file` defines, as protoc does: packages too, and enum values beside their enum."""
    parts = file.package.split(".") if file.package else []
    yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    scope = f"{file.package}." if file.package else ""
    for message in file.message_type:
        yield from _symbols_of_message(scope, message)
    for enum in file.enum_type:
        yield from _symbols_of_enum(scope, enum)
    yield from (scope + extension.name for extension in file.extension)
    for service in file.service:
        yield scope + service.name
        yield from (f"{scope}{service.name}.{method.name}" for method in service.method)


def _symbols_of_message(scope: str, message: DescriptorProto) -> Iterator[str]:
    yield scope + message.name
    scope = f"{scope}{message.name}."
    yield from (scope + field.name for field in (*message.field, *message.extension))
    yield from (scope + oneof.name for oneof in message.oneof_decl)
    for enum in message.enum_type:
        yield from _symbols_of_enum(scope, enum)
    for nested in message.nested_type:
        yield from _symbols_of_message(scope, nested)


def _symbols_of_enum(scope: str, enum: EnumDescriptorProto) -> Iterator[str]:
    yield scope + enum.name
    yield from (scope + value.name for value in enum.value)
