"""RPCs over HTTP, in the Connect protocol (https://connectrpc.com/docs/protocol) and in gRPC-Web.

Made from descriptors: no code knows a single RPC. Messages stay as bytes; JSON is converted at the border, and once for
all watchers that are sent the same bytes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import json
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias
from urllib.parse import quote

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.message import Message
from google.rpc import status_pb2

from jobstatus_grpc.auth import Identity
from jobstatus_grpc.errors import FieldViolation, InvalidFieldError, JobStatusError
from jobstatus_grpc.job import limits
from jobstatus_grpc.web.calls import Call, CallEndedError, Method, run
from jobstatus_grpc.web.http import HTTP_STATUS_OF_CODE, HttpError, Request, TooLargeError
from jobstatus_grpc.wire import status

Identify: TypeAlias = Callable[[Call], Awaitable[Identity]]
"""From a call to its caller; raises the error with which an RPC would be refused."""

MAX_TIMEOUT_SECONDS = 1e7
"""Of the deadline that a client gives: 115 days."""

LARGE_BYTES = 64 * 1024
"""Messages above this are converted from and to JSON in a thread, so that other calls get their turns: 4 MiB take half
a second."""

MAX_RENDERED = 128
"""Messages whose JSON is kept for the next watcher, or the next call, that is sent the same; and again of unary calls.
Each has at most LARGE_BYTES."""

END_OF_STREAM, WEB_TRAILERS, COMPRESSED = 0b10, 0x80, 0b1
"""Flags of a frame."""

_MALFORMED = b"\x00"
"""No message: given to a method in place of JSON that cannot be parsed, so that the call is refused, logged and counted
as one of gRPC."""


@dataclass(frozen=True)
class Rpc:
    """A method, and the classes of its messages."""

    method: Method
    input: type[Message]
    output: type[Message]

    @classmethod
    def of(cls, method: Method) -> Rpc:
        """Find the descriptors of a method by its path."""
        found: Any = descriptor_pool.Default().FindMethodByName(method.path[1:].replace("/", "."))
        make = message_factory.GetMessageClass
        return cls(method, make(found.input_type), make(found.output_type))


class Gateway:
    """Answers requests for RPCs."""

    def __init__(self, methods: Iterable[Method], *, identify: Identify | None, max_stream_seconds: float) -> None:
        """Take the methods.

        Args:
            methods: those of the server.
            identify: identifies the caller of a call. None: the server has no authentication.
            max_stream_seconds: time after which a stream with a reader that does not read is closed.
        """
        self.rpcs: Mapping[str, Rpc] = {each.path: Rpc.of(each) for each in methods}
        self.max_stream_seconds = max_stream_seconds
        self._identify = identify
        self._parsing = asyncio.Semaphore(1)

    async def answer(self, request: Request) -> None:
        """Answer a POST whose path is that of an RPC.

        Raises:
            HttpError: it is none of these protocols.
            DisconnectedError: the client has left.
        """
        rpc = self.rpcs[request.path]
        make = _PROTOCOLS.get((request.content_type(), rpc.method.is_stream))
        if make is None:
            accepted = [name for name, is_stream in _PROTOCOLS if is_stream == rpc.method.is_stream]
            raise HttpError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"{request.path} takes the content types {', '.join(accepted)}",
                fields=[("accept-post", ", ".join(accepted))],
            )
        protocol = make(request, rpc)
        try:
            await protocol.end(await self._call(request, rpc, protocol), None)
        except TooLargeError as error:
            text = f"{error.detail}; send less"
            request_error = CallEndedError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            await protocol.end(b"", request_error, http_status=error.code, fields=error.fields)
        except CallEndedError as error:
            await protocol.end(b"", error)

    async def _call(self, request: Request, rpc: Rpc, protocol: _Protocol) -> bytes:
        seconds = protocol.timeout_seconds()
        call = Call(request, seconds=seconds, send=protocol.write if rpc.method.is_stream else None)
        try:
            body = await request.body()
        except JobStatusError as error:
            await call.abort(*status.status_of(error))
        data, parse_error = protocol.message_in(body), ""
        if protocol.is_json:
            data, parse_error = await self._from_json(rpc.input, data, call)
        max_seconds = self.max_stream_seconds if rpc.method.is_stream else None
        try:
            return await run(rpc.method, data, call, request, max_seconds=max_seconds)
        except CallEndedError as error:
            if parse_error and error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise _refusal(parse_error) from None
            raise

    async def _from_json(self, message_class: type[Message], data: bytes, call: Call) -> tuple[bytes, str]:
        """Return the message in JSON, or one that no method takes and why."""
        if len(data) <= LARGE_BYTES:
            return from_json(message_class, data)
        if self._identify is not None:
            try:
                await self._identify(call)
            except JobStatusError:
                return _MALFORMED, ""  # the method refuses the caller before it looks at the message
        async with self._parsing:
            return await asyncio.to_thread(from_json, message_class, data)


def from_json(message_class: type[Message], data: bytes) -> tuple[bytes, str]:
    """Return the message in JSON, or one that no method takes and why. Unknown fields are ignored, as in binary."""
    try:
        # Strict, which json_format is not with bytes: a replaced character would be stored.
        return json_format.Parse(
            data.decode() or "{}", message_class(), ignore_unknown_fields=True
        ).SerializeToString(), ""
    except Exception as error:  # json_format raises ParseError, and what its parts do on strange values
        text = str(error).encode("utf-8", "backslashreplace").decode()  # it may quote a lone surrogate
        return _MALFORMED, f"is not a valid {message_class.DESCRIPTOR.name} in JSON: {text}"


def to_json(message_class: Callable[..., Message], data: bytes) -> bytes:
    """Return a message as JSON."""
    message = message_class()
    message.MergeFromString(data)
    return json_format.MessageToJson(message, indent=None, ensure_ascii=False).encode()


@functools.lru_cache(maxsize=MAX_RENDERED)
def _to_json_once(message_class: Callable[..., Message], data: bytes) -> bytes:
    return to_json(message_class, data)


@functools.lru_cache(maxsize=MAX_RENDERED)
def _to_json_again(message_class: Callable[..., Message], data: bytes) -> bytes:
    """For unary calls: their many different responses would drive out what all watchers are sent."""
    return to_json(message_class, data)


def _refusal(what: str) -> CallEndedError:
    return CallEndedError(*status.status_of(InvalidFieldError(violations=[FieldViolation("", what)])))


def _gunzip(data: bytes) -> bytes:
    """Unpack gzip, up to the limit of requests."""
    unpack = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpack.decompress(data, limits.MAX_REQUEST_BYTES + 1)
    except zlib.error:
        raise _refusal("is not the gzip that its header says") from None
    if len(unpacked) > limits.MAX_REQUEST_BYTES:
        raise TooLargeError(limits.MAX_REQUEST_BYTES)
    if not unpack.eof or unpack.unused_data:
        raise _refusal("is not one whole member of gzip")
    return unpacked


def _unpacked(data: bytes, encoding: str | None) -> bytes:
    """Return a message as it was before the compression that a header names."""
    if encoding in (None, "", "identity"):
        return data
    if encoding != "gzip":
        text = f"the compression {encoding} is not known here; use gzip or identity"
        raise CallEndedError(grpc.StatusCode.UNIMPLEMENTED, text)
    return _gunzip(data) if data else data


def _frame(flags: int, data: bytes) -> bytes:
    return struct.pack(">BI", flags, len(data)) + data


def _unframed(body: bytes, encoding: str | None) -> bytes:
    """Return the message in the one frame of a request."""
    if len(body) < 5 or len(body) - 5 != int.from_bytes(body[1:5], "big"):
        raise _refusal("must be one message in a frame: a flag byte, four bytes of length, the message")
    if body[0] not in (0, COMPRESSED):
        raise _refusal(f"has a frame with the flags {body[0]}; 0 and 1 are known")
    return _unpacked(body[5:], encoding if body[0] else None)


def _connect_error(error: CallEndedError) -> dict[str, Any]:
    """Return an error as the Connect protocol has it."""
    name = error.code().name.lower()
    found: dict[str, Any] = {"code": "canceled" if name == "cancelled" else name, "message": error.details()}
    if error.status_bytes is not None:
        found["details"] = [_detail(each) for each in status_pb2.Status.FromString(error.status_bytes).details]
    return found


def _detail(detail: Any) -> dict[str, Any]:
    debug = json_format.MessageToDict(detail)
    del debug["@type"]
    return {
        "type": detail.type_url.rpartition("/")[2],
        "value": base64.b64encode(detail.value).decode().rstrip("="),
        "debug": debug,
    }


class _Protocol:
    """How one call is carried: its request is read, and its response written."""

    def __init__(self, request: Request, rpc: Rpc, content_type: str) -> None:
        self.request = request
        self.rpc = rpc
        self.content_type = content_type
        self.is_json = content_type.endswith("json")

    def timeout_seconds(self) -> float | None:
        """Return the time that the client gives the call; None: any."""
        raise NotImplementedError

    def message_in(self, body: bytes) -> bytes:
        """Return the message of the request."""
        raise NotImplementedError

    async def write(self, message: bytes) -> None:
        """Send a message of a stream."""
        raise NotImplementedError

    async def end(
        self, reply: bytes, error: CallEndedError | None, *, http_status: int | None = None, fields: Any = ()
    ) -> None:
        """Send the response of a unary call, or the end of a stream.

        Args:
            reply: the response; empty for a stream.
            error: how the call ended; None: with OK.
            http_status: in place of that of the error, where the protocol has one.
            fields: more header fields.
        """
        raise NotImplementedError

    async def encoded(self, message: bytes) -> bytes:
        """Return a message of the response in the codec of the request."""
        if not self.is_json:
            return message
        if len(message) > LARGE_BYTES:
            return await asyncio.to_thread(to_json, self.rpc.output, message)
        render = _to_json_once if self.rpc.method.is_stream else _to_json_again
        return render(self.rpc.output, message)  # type: ignore[arg-type]  # a class of messages is hashable


def _connect_timeout(request: Request) -> float | None:
    text = request.header("connect-timeout-ms")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 10:
        raise HttpError(HTTPStatus.BAD_REQUEST, "connect-timeout-ms must be a number of at most 10 digits")
    return int(text) / 1000


def _check_version(request: Request) -> None:
    if (version := request.header("connect-protocol-version")) not in (None, "1"):
        raise HttpError(HTTPStatus.BAD_REQUEST, f"connect-protocol-version must be 1, not {version}")


class _ConnectUnary(_Protocol):
    def timeout_seconds(self) -> float | None:
        _check_version(self.request)
        return _connect_timeout(self.request)

    def message_in(self, body: bytes) -> bytes:
        return _unpacked(body, self.request.header("content-encoding"))

    async def end(
        self, reply: bytes, error: CallEndedError | None, *, http_status: int | None = None, fields: Any = ()
    ) -> None:
        if error is None:
            await self.request.respond(HTTPStatus.OK, self.content_type, await self.encoded(reply), fields)
            return
        code = http_status or HTTP_STATUS_OF_CODE[error.code().name]
        text = json.dumps(_connect_error(error), ensure_ascii=False).encode()
        await self.request.respond(code, "application/json", text, fields)


class _ConnectStream(_Protocol):
    def timeout_seconds(self) -> float | None:
        _check_version(self.request)
        return _connect_timeout(self.request)

    def message_in(self, body: bytes) -> bytes:
        return _unframed(body, self.request.header("connect-content-encoding"))

    async def write(self, message: bytes) -> None:
        await self._start(())
        await self.request.write(_frame(0, await self.encoded(message)))

    async def end(
        self, reply: bytes, error: CallEndedError | None, *, http_status: int | None = None, fields: Any = ()
    ) -> None:
        await self._start(fields)
        end = {} if error is None else {"error": _connect_error(error)}
        last = _frame(END_OF_STREAM, json.dumps(end, ensure_ascii=False).encode())
        await self.request.write(last, is_last=True)

    async def _start(self, fields: Any) -> None:
        if not self.request.is_started:
            await self.request.start(HTTPStatus.OK, [("content-type", self.content_type), *fields])


class _GrpcWeb(_Protocol):
    """gRPC-Web, unary calls and streams alike; as text each part of the body is in base64."""

    def __init__(self, request: Request, rpc: Rpc, content_type: str) -> None:
        super().__init__(request, rpc, content_type)
        self._is_text = "-text" in content_type

    def timeout_seconds(self) -> float | None:
        text = self.request.header("grpc-timeout")
        if text is None:
            return None
        unit, digits = _GRPC_UNITS.get(text[-1:]), text[:-1]
        if unit is None or not (digits.isascii() and digits.isdigit()) or len(digits) > 8:
            raise HttpError(HTTPStatus.BAD_REQUEST, "grpc-timeout must be 1 to 8 digits and a unit: H, M, S, m, u or n")
        return min(int(digits) * unit, MAX_TIMEOUT_SECONDS)

    def message_in(self, body: bytes) -> bytes:
        if self._is_text:
            try:
                body = base64.b64decode(body, validate=True)
            except binascii.Error:
                raise _refusal("is not base64, which application/grpc-web-text needs") from None
        return _unframed(body, self.request.header("grpc-encoding"))

    async def write(self, message: bytes) -> None:
        await self._start(())
        await self.request.write(self._as_sent(_frame(0, await self.encoded(message))))

    async def end(
        self, reply: bytes, error: CallEndedError | None, *, http_status: int | None = None, fields: Any = ()
    ) -> None:
        await self._start(fields)
        is_unary = error is None and not self.rpc.method.is_stream
        first = _frame(0, await self.encoded(reply)) if is_unary else b""
        last = _frame(WEB_TRAILERS, _trailers(error).encode())
        await self.request.write(self._as_sent(first + last), is_last=True)

    async def _start(self, fields: Any) -> None:
        if not self.request.is_started:
            await self.request.start(HTTPStatus.OK, [("content-type", self.content_type), *fields])

    def _as_sent(self, data: bytes) -> bytes:
        return base64.b64encode(data) if self._is_text else data


def _trailers(error: CallEndedError | None) -> str:
    if error is None:
        return "grpc-status: 0\r\n"
    text = f"grpc-status: {error.code().value[0]}\r\ngrpc-message: {quote(error.details(), safe=_PLAIN)}\r\n"
    if error.status_bytes is not None:
        text += f"{status.DETAILS_KEY}: {base64.b64encode(error.status_bytes).decode().rstrip('=')}\r\n"
    return text


_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")

_GRPC_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

_PROTOCOLS: Mapping[tuple[str, bool], Callable[[Request, Rpc], _Protocol]] = {
    (name, is_stream): functools.partial(protocol, content_type=name)
    for protocol, is_stream, names in (
        (_ConnectUnary, False, ("application/json", "application/proto")),
        (_ConnectStream, True, ("application/connect+json", "application/connect+proto")),
        *(
            (
                _GrpcWeb,
                is_stream,
                (
                    "application/grpc-web+proto",
                    "application/grpc-web",
                    "application/grpc-web+json",
                    "application/grpc-web-text+proto",
                    "application/grpc-web-text",
                ),
            )
            for is_stream in (False, True)
        ),
    )
    for name in names
}
"""By content type, and whether the RPC is a stream."""
