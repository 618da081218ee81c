"""The random load of `jobstatus verify` on servers that a test harms, and the judgement of its calls."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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


async def judged_under_faults(
    addresses: Sequence[str],
    fault: Callable[[], Awaitable[None]],
    *,
    times: int,
    pause: Callable[[], float],
    seed: int,
    clients: int = 6,
    patience_seconds: float = 3.0,
) -> Judged:
    """Load servers of one store, cause a fault `times` times, and require that the checker finds nothing.

    `fault` returns when the servers answer again; `pause` gives the seconds before the next fault. A change must
    reach its watchers within `patience_seconds`.
    """
    endpoints = [Endpoint(address) for address in addresses]
    async with Recorder(endpoints, timeout_seconds=CALL_TIMEOUT_SECONDS) as recorder:
        workload = Workload(recorder, labels={"faults": uuid.uuid4().hex}, seed=seed, clients=clients)
        loading = asyncio.create_task(workload.run(LONGEST_LOAD_SECONDS, patience_seconds=patience_seconds))
        try:
            for _ in range(times):
                await asyncio.wait([loading], timeout=pause())
                assert not loading.done(), loading.result()
                await fault()
            await asyncio.sleep(pause())
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
        acknowledged=sum(map(_acknowledged, recorder.entries)),
        failures=Counter(entry.code for entry in unary if entry.code != "OK" and not entry.is_refused),
    )


def _shown(violations: Sequence[checker.Violation]) -> str:
    """Say what was found, with the calls of the first in a file for `jobstatus verify --history`."""
    file = Path(tempfile.mkdtemp(prefix="violation-")) / "history.jsonl"
    history.write(violations[0].entries, file)
    lines = [f"{violation.rule}: {violation.text}" for violation in violations[:10]]
    return "\n".join([*lines, f"the calls of the first are in {file}"])


def _acknowledged(entry: Entry) -> int:
    if entry.method not in WRITES or entry.response is None:
        return 0
    if entry.method == "BatchUpdateJobs":
        return sum(result.HasField("job") for result in entry.response.results)
    return 1
