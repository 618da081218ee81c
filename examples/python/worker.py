"""A worker and a watcher of one job. Usage: python worker.py HOST:PORT [SECONDS_PER_STEP]

The client retries what is safe to retry, and resumes watches, by itself. For a worker that needs no more than to report
what it does, `client.track(name)` is shorter still: the README shows it.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from jobstatus_grpc import JobNotFoundError, JobState, JobStatusClient, StaleAttemptError


def say(line: str) -> None:
    """Print a line in one piece: two threads do."""
    print(f"{line}\n", end="", flush=True)


def watch(client: JobStatusClient, job_id: str, begun: threading.Event) -> None:
    """Print each new state of a job to its end."""
    state = None
    try:
        for job in client.watch(job_id):
            if job.state is not state:
                say(f"watch: JOB_STATE_{job.state.name}")
            state = job.state
            begun.set()
    finally:
        begun.set()


def work(client: JobStatusClient, job_id: str, attempt: int, seconds_per_step: float) -> None:
    """Report three steps and the end of an attempt; stop when asked to."""
    end = JobState.SUCCEEDED
    step = 0
    while step < 3 and end is JobState.SUCCEEDED:
        time.sleep(seconds_per_step)  # the work
        step += 1
        job = client.update(job_id, progress=25 * step, attempt=attempt)
        say(f"progress: {job.progress:g}")
        if job.cancel_requested:
            end = JobState.CANCELLED
    job = client.update(job_id, state=end, result={"steps": step}, attempt=attempt)
    say(f"ended: JOB_STATE_{job.state.name}, progress {job.progress:g}")


def main(address: str, seconds_per_step: float = 0.1) -> None:
    with ThreadPoolExecutor() as threads, JobStatusClient(address) as client:
        # The request_id makes this safe to repeat: the job is created once.
        request_id = str(uuid.uuid4())
        created = client.create("import customers", heartbeat_timeout_seconds=60, request_id=request_id)
        say(f"job: {created.id}")
        say(f"created: JOB_STATE_{created.state.name}")
        again = client.create("import customers", heartbeat_timeout_seconds=60, request_id=request_id)
        assert again.id == created.id
        say("created again: the same job")

        # A claim names the attempt that it begins. Later updates name the same, so that a lost worker cannot write.
        claimed = client.update(created.id, state=JobState.IN_PROGRESS, attempt=1)
        say(f"claimed: JOB_STATE_{claimed.state.name}, attempt {claimed.attempt}")

        begun = threading.Event()
        watching = threads.submit(watch, client, created.id, begun)
        begun.wait()

        # Of two claims of one attempt one wins; this is the other.
        try:
            client.update(created.id, state=JobState.IN_PROGRESS, attempt=1)
            sys.exit("two claims won")
        except StaleAttemptError as error:
            say(f"second claim: {error.reason}")

        work(client, created.id, claimed.attempt, seconds_per_step)
        watching.result()  # raises what the watch raised

        try:
            client.get("no-such-job")
            sys.exit("a job that nobody created")
        except JobNotFoundError as error:
            say(f"unknown job: {error.reason}")


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
