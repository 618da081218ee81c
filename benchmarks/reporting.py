"""`python -m benchmarks.reporting ADDRESS SECONDS JOBS`: a worker process whose jobs report ten times a second each.

It makes the jobs, says `ready`, reports through our client's `reporter()` once it is given a line, and says `done`.
When its input ends it tells what it gave and what that cost, and what the same loop costs without a reporter.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from jobstatus_grpc import JobState, JobStatusClient, JobStatusError, JobUpdate

REPORTS_A_SECOND = 10
TICK_SECONDS = 0.01


def _report(jobs: int, seconds: float, update: Callable[[str, float], object]) -> tuple[int, float]:
    """Let each job report at its times, evenly spread; return how many reports that were, and the process's CPU."""
    each_tick = max(1, round(jobs * REPORTS_A_SECOND * TICK_SECONDS))
    started, used, given = time.perf_counter(), time.process_time(), 0
    for tick in range(round(seconds / TICK_SECONDS)):
        for _ in range(each_tick):
            update(f"job-{given % jobs}", given / jobs * 0.01)
            given += 1
        time.sleep(max(0.0, started + (tick + 1) * TICK_SECONDS - time.perf_counter()))
    return given, time.process_time() - used


def main() -> None:
    """Report as the command line says."""
    address, seconds, jobs = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    failures: list[JobStatusError] = []

    def on_error(update: JobUpdate, error: JobStatusError) -> None:
        failures.append(error)

    with JobStatusClient(address) as client:
        with client.reporter(on_error=on_error) as reporter:
            for number in range(jobs):
                reporter.update(f"job-{number}", state=JobState.IN_PROGRESS, allow_missing=True)
            reporter.flush()
            print("ready", flush=True)
            sys.stdin.readline()
            started = time.perf_counter()
            given, used = _report(jobs, seconds, lambda job_id, progress: reporter.update(job_id, progress=progress))
            reporter.flush()
            spent = time.perf_counter() - started
        print("done", flush=True)
        sys.stdin.read()
    _, loop_used = _report(jobs, seconds, lambda job_id, progress: None)
    found = {"given": given, "seconds": spent, "cpu": used, "loop_cpu": loop_used, "failures": len(failures)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
