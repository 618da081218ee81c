"""Both clients, used in one way, so that one test holds for both."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from jobstatus_grpc import AsyncJobStatusClient, JobStatusClient
from tests.support.servers import ServerProcess

MAX_WAIT_SECONDS = 20.0


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(MAX_WAIT_SECONDS)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BlockingIterator:
    """An asynchronous iterator with the interface of a blocking one."""

    def __init__(self, loop: Loop, items: Any) -> None:
        self._loop = loop
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        async def read() -> Any:
            return await anext(self._items, None)

        item = self._loop.run(read())
        if item is None:
            raise StopIteration
        return item

    @property
    def resume_token(self) -> str:
        return self._items.resume_token

    def close(self) -> None:
        self._loop.run(self._items.aclose())


class BlockingBlock:
    """An asynchronous context manager with the interface of a blocking one."""

    def __init__(self, loop: Loop, block: Any) -> None:
        self._loop = loop
        self._block = block

    def __enter__(self) -> Any:
        return self._loop.run(self._block.__aenter__())

    def __exit__(self, *error: Any) -> None:
        self._loop.run(self._block.__aexit__(*error))


class BlockingReporter(BlockingBlock):
    def __enter__(self) -> Any:
        super().__enter__()
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._block.update(*args, **kwargs)

    def flush(self, timeout_seconds: float | None = None) -> None:
        self._loop.run(self._block.flush(timeout_seconds))


class BlockingClient:
    """The asyncio client with the interface of JobStatusClient."""

    def __init__(self, loop: Loop, client: AsyncJobStatusClient) -> None:
        self._loop = loop
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._loop.run(method(*args, **kwargs))

        return call

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run(coroutine)

    def watch(self, *args: Any, **kwargs: Any) -> BlockingIterator:
        return BlockingIterator(self._loop, self._client.watch(*args, **kwargs))

    def watch_jobs(self, *args: Any, **kwargs: Any) -> BlockingIterator:
        return BlockingIterator(self._loop, self._client.watch_jobs(*args, **kwargs))

    def list_all(self, *args: Any, **kwargs: Any) -> BlockingIterator:
        return BlockingIterator(self._loop, self._client.list_all(*args, **kwargs))

    def track(self, *args: Any, **kwargs: Any) -> BlockingBlock:
        return BlockingBlock(self._loop, self._client.track(*args, **kwargs))

    def reporter(self, *args: Any, **kwargs: Any) -> BlockingReporter:
        return BlockingReporter(self._loop, self._client.reporter(*args, **kwargs))


@pytest.fixture(params=["aio", "sync"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """`connect(address, …)` returns a client, once of each kind, to be used as JobStatusClient; it is closed."""
    with contextlib.ExitStack() as stack:
        if request.param == "sync":
            yield lambda *args, **settings: stack.enter_context(JobStatusClient(*args, **settings))
            return
        loop = Loop()
        stack.callback(loop.stop)

        def connect(*args: Any, **settings: Any) -> BlockingClient:
            client = BlockingClient(loop, AsyncJobStatusClient(*args, **settings))
            stack.callback(client.close)
            return client

        yield connect


@pytest.fixture(scope="session")
def memory_address() -> Iterator[str]:
    """A server that all tests share."""
    with ServerProcess() as server:
        yield server.address


@pytest.fixture
def new_id() -> Callable[[], str]:
    """Make ids that no other test uses."""
    return lambda: f"job-{uuid.uuid4().hex}"


@pytest.fixture
def client(connect: Callable[..., Any], memory_address: str) -> Any:
    """A client, once of each kind, of the shared server."""
    return connect(memory_address)


@pytest.fixture
def sqlite_server(tmp_path: Any) -> Iterator[ServerProcess]:
    """A server of this test's own that keeps its jobs over restarts."""
    with ServerProcess(store=f"sqlite:///{tmp_path}/jobs.db", log=tmp_path / "log") as server:
        yield server


@pytest.fixture
def unused_address() -> str:
    """An address without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


class Background:
    """A call in a thread, with its result or error."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def result(self) -> Any:
        self._thread.join(MAX_WAIT_SECONDS)
        assert not self._thread.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = self._call()
        except BaseException as error:
            self._error = error


@pytest.fixture
def background() -> Callable[[Callable[[], Any]], Background]:
    """`background(call)` runs it in a thread; `.result()` waits for it and returns its result or raises its error."""
    return Background
