"""Calls servers and records each call as an entry of a history."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any

import grpc
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc.client.endpoint import Endpoint
from jobstatus_grpc.errors import JobStatusError, ResourceExhaustedError
from jobstatus_grpc.verify.history import Entry
from jobstatus_grpc.wire import status

LIMITED_SECONDS = 60.0
"""Time for which a call is repeated whose caller is limited."""

DELETIONS_AT_ONCE = 16
"""Calls in flight that delete jobs: the server is in use."""


class Recorder:
    """Makes calls on servers that share a store, and keeps their history. A context manager of one event loop."""

    def __init__(self, endpoints: Sequence[Endpoint], *, timeout_seconds: float) -> None:
        self.entries: list[Entry] = []
        self.size = len(endpoints)
        self._endpoints = endpoints
        self._timeout_seconds = timeout_seconds
        self._numbers = itertools.count(1)
        self._stubs: list[Any] = []
        self._channels = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Recorder:
        for endpoint in self._endpoints:
            channel = await self._channels.enter_async_context(endpoint.open_aio())
            self._stubs.append(JobStatusServiceStub(channel))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channels.aclose()

    async def call(self, method: str, request: Any, *, server: int = 0) -> Entry:
        """Make a unary call and return its entry, also if it fails.

        A server may limit the rate of calls: a refused call is made again when the server asks for that.
        """
        ends_at = time.monotonic() + LIMITED_SECONDS
        while True:
            entry, pause_seconds = await self._call_once(method, request, server)
            if pause_seconds is None or time.monotonic() + pause_seconds > ends_at:
                return entry
            await asyncio.sleep(pause_seconds)

    async def _call_once(self, method: str, request: Any, server: int) -> tuple[Entry, float | None]:
        """Return the entry of a call, and the pause that the server asks for if it limits the caller."""
        entry = self._begin(method, request, server)
        pause_seconds = None
        try:
            call = getattr(self._stubs[server], method)
            reply = await call(request, timeout=self._timeout_seconds, metadata=self._endpoints[server].metadata)
            entry.responses.append((time.monotonic(), reply))
            entry.code = "OK"
        except grpc.aio.AioRpcError as error:
            meaning = _note(entry, error)
            if isinstance(meaning, ResourceExhaustedError):
                pause_seconds = meaning.retry_after_seconds
        finally:
            entry.ended_at = time.monotonic()
        return entry, pause_seconds

    @contextlib.asynccontextmanager
    async def watch(self, method: str, request: Any, *, server: int = 0) -> AsyncIterator[Stream]:
        """Receive a stream during the block."""
        stream = Stream(self._begin(method, request, server))
        call = getattr(self._stubs[server], method)(request, metadata=self._endpoints[server].metadata)
        receiving = asyncio.create_task(stream.receive(call))
        try:
            yield stream
        finally:
            # The time is taken before the cancellation: what is sent after it need not arrive.
            stream.entry.ended_at = min(stream.entry.ended_at, time.monotonic())
            receiving.cancel()
            await asyncio.wait([receiving])

    @contextlib.asynccontextmanager
    async def stalled(self, method: str, request: Any, *, server: int = 0) -> AsyncIterator[None]:
        """Keep a stream open during the block and read nothing from it."""
        call = getattr(self._stubs[server], method)(request, metadata=self._endpoints[server].metadata)
        try:
            yield
        finally:
            call.cancel()

    async def delete(self, job_ids: Iterable[str]) -> int:
        """Delete jobs, which are aborted before; return how many are left, because the server did not do it."""
        ids = iter(job_ids)
        left = 0

        async def delete_some() -> None:
            nonlocal left
            for job_id in ids:
                abort = pb.UpdateJobRequest(job=pb.JobStatus(id=job_id, state=pb.JOB_STATE_ABORTED))
                await self.call("UpdateJob", abort)
                left += (await self.call("DeleteJob", pb.DeleteJobRequest(id=job_id))).code not in ("OK", "NOT_FOUND")

        await asyncio.gather(*(delete_some() for _ in range(DELETIONS_AT_ONCE)))
        return left

    def _begin(self, method: str, request: Any, server: int) -> Entry:
        address = self._endpoints[server].target
        # A copy: the caller may change the request afterwards.
        copy = type(request).FromString(request.SerializeToString())
        entry = Entry(
            number=next(self._numbers), server=address, method=method, request=copy, started_at=time.monotonic()
        )
        self.entries.append(entry)
        return entry


class Stream:
    """A stream that is being received."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.ended = asyncio.Event()
        """Set when the server or the network has ended it."""

    async def receive(self, call: Any) -> None:
        """Record each message, and the end."""
        try:
            async for message in call:
                self.entry.responses.append((time.monotonic(), message))
            self.entry.code = "OK"
        except grpc.aio.AioRpcError as error:
            _note(self.entry, error)
        finally:
            self.entry.ended_at = min(self.entry.ended_at, time.monotonic())
            call.cancel()
        self.ended.set()


def _note(entry: Entry, error: grpc.aio.AioRpcError) -> JobStatusError:
    meaning = status.from_rpc_error(error)
    entry.code, entry.reason, entry.message = error.code().name, meaning.reason, meaning.message
    return meaning
