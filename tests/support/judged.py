"""The random load of `jobstatus verify` on servers that a test harms, and the judgement of its calls."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobstatus_grpc.client.endpoint import Endpoint
from jobstatus_grpc.verify import checker, history
from jobstatus_grpc.verify.history import Entry
from jobstatus_grpc.verify.recorder import Recorder
from jobstatus_grpc.verify.workload import Workload

WRITES = {"CreateJob", "UpdateJob", "BatchUpdateJobs", "CancelJob", "DeleteJob"}
CALL_TIMEOUT_SECONDS = 5.0
LONGEST_LOAD_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What was done, and judged without a violation."""

    faults: int
    calls: int
    acknowledged: int
    """Writes that the server has acknowledged; those of a batch count singly."""
    failures: Counter[str]
    """The codes of calls that were neither answered nor refused."""

    @property
    def what(self) -> str:
        """What was judged, for a row of docs/reliability.md."""
        return f"{self.acknowledged:,} acknowledged writes, {self.calls:,} calls"


class CountingRecorder(Recorder):
    """A recorder that counts the writes that were acknowledged; those of a batch count singly."""

    acknowledged = 0

    async def call(self, method: str, request: Any, *, server: int = 0) -> Entry:
        entry = await super().call(method, request, server=server)
        if entry.method in WRITES and entry.response is not None:
            is_batch = entry.method == "BatchUpdateJobs"
            self.acknowledged += sum(result.HasField("job") for result in entry.response.results) if is_batch else 1
        return entry

    async def until_acknowledged(self, writes: int) -> None:
        """Wait for this number of writes from now."""
        goal = self.acknowledged + writes
        while self.acknowledged < goal:  # noqa: ASYNC110 - an event would be set thousands of times
            await asyncio.sleep(0.002)


async def judged_under_faults(
    addresses: Sequence[str],
    fault: Callable[[], Awaitable[None]],
    *,
    times: int,
    pause: Callable[[], float] = lambda: 0,
    writes: Callable[[], int] = lambda: 0,
    seed: int,
    clients: int = 6,
    patience_seconds: float = 3.0,
) -> Judged:
    """Load servers of one store, cause a fault `times` times, and require that the checker finds nothing.

    `fault` returns when the servers answer again. The next comes after the seconds that `pause` gives, and then after
    the number of acknowledged writes that `writes` gives. A change must reach its watchers within `patience_seconds`.
    """
    endpoints = [Endpoint(address) for address in addresses]
    recorder = CountingRecorder(endpoints, timeout_seconds=CALL_TIMEOUT_SECONDS)
    async with recorder:
        workload = Workload(recorder, labels={"faults": uuid.uuid4().hex}, seed=seed, clients=clients)
        loading = asyncio.create_task(workload.run(LONGEST_LOAD_SECONDS, patience_seconds=patience_seconds))
        try:
            for _ in range(times):
                await _until_due(recorder, loading, pause(), writes())
                await fault()
            await _until_due(recorder, loading, pause(), writes())
            workload.stop()
            await loading
        finally:
            loading.cancel()
            await asyncio.wait([loading])
    violations = checker.check(recorder.entries, patience_seconds=patience_seconds)
    assert not violations, _shown(violations)
    unary = [entry for entry in recorder.entries if not entry.method.startswith("Watch")]
    return Judged(
        faults=times,
        calls=len(recorder.entries),
        acknowledged=recorder.acknowledged,
        failures=Counter(entry.code for entry in unary if entry.code != "OK" and not entry.is_refused),
    )


async def _until_due(recorder: CountingRecorder, loading: asyncio.Task[None], seconds: float, writes: int) -> None:
    """Wait until the next fault is due; raise the error of the load if it has failed."""
    await asyncio.wait([loading], timeout=seconds)
    writing = asyncio.create_task(recorder.until_acknowledged(writes))
    try:
        await asyncio.wait([loading, writing], return_when=asyncio.FIRST_COMPLETED)
    finally:
        writing.cancel()
    assert not loading.done(), loading.result()


def _shown(violations: Sequence[checker.Violation]) -> str:
    """Say what was found, with the calls of the first in a file for `jobstatus verify --history`."""
    file = Path(tempfile.mkdtemp(prefix="violation-")) / "history.jsonl"
    history.write(violations[0].entries, file)
    lines = [f"{violation.rule}: {violation.text}" for violation in violations[:10]]
    return "\n".join([*lines, f"the calls of the first are in {file}"])
