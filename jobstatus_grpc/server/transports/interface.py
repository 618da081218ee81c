"""The border between the calls of the server and the transports that carry them: methods, contexts, a transport's life.

`grpcio` and `native` implement it; `server/app.py` chooses one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, Protocol, TypeAlias, TypeVar

import grpc

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]


class CallContext(Protocol):
    """A call in progress. `grpc.aio.ServicerContext` is one as it is."""

    def peer(self) -> str:
        """Return the client's address as gRPC writes it: `ipv4:127.0.0.1:50000`."""
        ...

    def invocation_metadata(self) -> Metadata | None:
        """Return the metadata that the client sent."""
        ...

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """Return what TLS knows of the client, in the keys of gRPC: `x509_pem_cert` is its certificate."""
        ...

    def time_remaining(self) -> float | None:
        """Return the seconds left until the call's deadline; None: it has none."""
        ...

    def add_done_callback(self, callback: Callable[[Any], None], /) -> None:
        """Call `callback` with something once the call has ended, and its response, if any, is sent."""
        ...

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with a status, and raise what the transport expects to see then."""
        ...


class StreamContext(CallContext, Protocol):
    """A call in progress that is answered with a stream of messages."""

    @property
    def try_send(self) -> Callable[[bytes], int] | None:
        """A function that sends a message unless it would have to wait.

        It returns about the microseconds that the event loop needs for that; 0: the message was not sent, use `write`.
        None: the transport has none.
        """
        ...

    async def write(self, message: bytes) -> None:
        """Send a message once there is room for it.

        Raises:
            CancelledError: the client has left.
            StreamAgeError: there was no room until the stream reached its maximum age.
        """
        ...

    async def flush(self) -> None:
        """Wait until the transport holds no message of `try_send` for which there was no room."""
        ...


Behaviour: TypeAlias = Callable[[bytes, Any], Awaitable[bytes | None]]
"""From a request's bytes and a CallContext to the response, or from a StreamContext to None at the stream's end."""


B = TypeVar("B")


@dataclass(frozen=True)  # a frozen one with slots cannot be made by its alias Method
class Rpc(Generic[B]):
    """An RPC and what answers it: for a transport a Behaviour."""

    path: str
    """Such as `/jobstatus.v1.JobStatusService/GetJob`."""
    behaviour: B
    is_stream: bool
    is_long_poll: bool = False
    """Whether a unary call may last as long as a watch does."""

    @property
    def is_lasting(self) -> bool:
        """Whether a call may last, and counts as a watch: a stream, or a long poll."""
        return self.is_stream or self.is_long_poll

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


Method: TypeAlias = Rpc[Behaviour]


class Transport(Protocol):
    """Takes calls until it is stopped."""

    async def start(self) -> list[str]:
        """Listen, and return the addresses as bound; raise CannotListenError if one cannot be."""
        ...

    async def stop(self, grace_seconds: float) -> None:
        """Take no more calls, give the running ones `grace_seconds`, then cut them off."""
        ...
