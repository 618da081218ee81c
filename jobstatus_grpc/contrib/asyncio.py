"""asyncio tasks as jobs: `create_task` in the place of `asyncio.create_task`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from jobstatus_grpc.client import AsyncJobStatusClient, AsyncTrackedJob
from jobstatus_grpc.contrib.task import DEFAULT_NAME

__all__ = ["create_task"]

T = TypeVar("T")


def create_task(
    client: AsyncJobStatusClient,
    coroutine: Coroutine[Any, Any, T],
    *,
    name: str = "",
    cancel_on_request: bool = False,
    **track: Any,
) -> asyncio.Task[T]:
    """Run a coroutine as a task of the running event loop and as a job. The name of the task is the id of the job.

    A task that is cancelled before it begins has no job.

    Args:
        client: of the server; it stays open until the task is done.
        coroutine: the work.
        name: of the job; "": the name of the coroutine's function.
        cancel_on_request: cancel the task when the end of the job is requested; costs a watch.
        track: other arguments of the client's `track`.
    """
    job = client.track(name or getattr(coroutine, "__qualname__", DEFAULT_NAME), **track)
    task = asyncio.get_running_loop().create_task(_run(job, coroutine, cancel_on_request), name=job.id)
    # A task that is cancelled before it begins does not await it, which would be a warning.
    task.add_done_callback(lambda _: coroutine.close())
    return task


async def _run(job: AsyncTrackedJob, coroutine: Coroutine[Any, Any, T], cancel_on_request: bool) -> T:
    async with job:
        if not cancel_on_request:
            return await coroutine
        task = asyncio.current_task()
        assert task is not None
        watching = asyncio.ensure_future(_cancel(job, task))
        try:
            return await coroutine
        finally:
            watching.cancel()


async def _cancel(job: AsyncTrackedJob, task: asyncio.Task[Any]) -> None:
    if await job.wait_cancelled() and job.cancelled:
        task.cancel()
